"""A folder appears whole or not at all: built beside the target, published by rename, continued after a kill."""

import errno
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rotrl.checkpoint import files as steps
from rotrl.checkpoint.files import fsync
from rotrl.errors import CheckpointError

JOURNAL = ".journal"
KINDS = (".partial", ".old", ".trash")


class AlreadyPublished(Exception):
    """Another process has published the target meanwhile."""


@contextmanager
def staging(target: Path, *, overwrite: bool = False, key: str | None = None) -> Iterator[Path]:
    """Gives a folder beside `target`; on success it becomes `target`, on any error nothing remains of it.

    Where a run with the same `key` was killed or interrupted, the folder holds the shards that it had finished. An
    existing target is replaced only if `overwrite`, and kept until the new one is whole. AlreadyPublished where another
    process was faster; CheckpointError where the disk refuses.
    """
    target = Path(target).absolute()
    folder, kept = _own(target, ".partial"), False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _take_over(target, folder, key)
        folder.mkdir(exist_ok=True)
        steps.step("staged")
        yield folder
        fsync(folder)
        steps.step("folder synced")
        _publish(folder, target, overwrite)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{target}: can't be written ({reason}); free the disk or choose another output"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        kept = bool(finished(folder, key))
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def finished(folder: Path, key: str | None) -> dict[str, dict]:
    """What the journal of a folder tells of each finished shard; nothing where it is that of another `key`."""
    entries = {}
    for path in sorted((folder / JOURNAL).glob("*.json")) if key is not None else ():
        with suppress(OSError, ValueError):
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["key"] == key:
                entries[path.stem] = entry
    return entries


def abandoned(target: Path) -> list[Path]:
    """The folders that killed processes of this machine left beside the target."""
    target = Path(target).absolute()
    found = []
    for folder in sorted(target.parent.glob(f"{glob.escape(_mark(target))}*")):
        process = folder.stem.removeprefix(_mark(target))
        if folder.suffix in KINDS and process.isdigit() and not _alive(int(process)):
            found.append(folder)
    return found


def _take_over(target: Path, folder: Path, key: str | None) -> None:
    """Makes one abandoned folder of this `key` our own and removes the others; one moved aside in vain comes back.

    Of several processes the one that renames a folder has it: nobody deletes or adds to what another adopts.
    """
    trash = _own(target, ".trash")
    for left in sorted(abandoned(target), key=lambda left: left != folder):
        if left.suffix == ".old" and not target.exists():
            left.rename(target)
            continue
        adopt = bool(finished(left, key)) and (left == folder or not folder.exists())
        with suppress(FileNotFoundError):
            left.rename(folder if adopt else trash)
            if adopt:
                keep = {JOURNAL, *finished(folder, key)}
                for file in folder.iterdir():
                    if file.name not in keep:
                        file.unlink()
        shutil.rmtree(trash, ignore_errors=True)


def _publish(folder: Path, target: Path, overwrite: bool) -> None:
    old, trash = _own(target, ".old"), _own(target, ".trash")
    try:
        if overwrite:
            with suppress(FileNotFoundError):
                target.rename(old)
            steps.step("old moved aside")
        with suppress(FileNotFoundError):
            (folder / JOURNAL).rename(trash)
        folder.rename(target)  # replaces no folder that holds anything
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise AlreadyPublished(target) from error
        raise
    finally:
        shutil.rmtree(trash, ignore_errors=True)
    steps.step("published")
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    steps.step("old removed")


def _own(target: Path, kind: str) -> Path:
    return target.with_name(f"{_mark(target)}{os.getpid()}{kind}")


def _mark(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}-"


def _alive(process: int) -> bool:
    """Whether another process has this id; one of our own folders from before us is abandoned too."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
