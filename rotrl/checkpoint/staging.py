"""A folder appears whole or not at all: built beside the target, published by rename, continued after a kill."""

import errno
import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from rotrl.checkpoint import files as steps
from rotrl.checkpoint.files import fsync
from rotrl.errors import CheckpointError

JOURNAL = ".journal"
KINDS = (".partial", ".old", ".trash")


class AlreadyPublished(Exception):
    """Another process has published the target meanwhile."""


_live = set[Path]()  # staging folders in use by this process


@contextmanager
def staging(target: Path, *, overwrite: bool = False, key: str | None = None) -> Iterator[Path]:
    """Gives a folder beside `target`; on success it becomes `target`, on any error nothing remains of it.

    Shards that another run with the same `key` has finished, on this machine or another, killed or still at work, stand
    in it as links: nothing in a staging folder is changed but by its owner, and `write_weights` trusts no byte unseen.
    An existing target is replaced only if `overwrite`, and kept until the new one is whole. AlreadyPublished where
    another process was faster; CheckpointError where the disk refuses.
    """
    target = Path(target).absolute()
    folder, kept = target.with_name(f"{_mark(target)}{os.getpid()}-{uuid4().hex[:8]}.partial"), False
    _live.add(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        if key is not None:
            _adopt(target, folder, key)
        _clear(target, folder.with_suffix(".trash"))
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
        _live.discard(folder)
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
    """The folders that killed processes of this machine left beside the target. Of those of another machine nothing
    tells whether their owner lives: they are left to it, whatever became of it."""
    target = Path(target).absolute()
    found = []
    for folder in sorted(target.parent.glob(f"{glob.escape(_mark(target))}*")):
        # Whole, or the folder of host `node-17` would be that of process 17 on `node`.
        owner = re.fullmatch(r"(\d+)(-[0-9a-f]+)?", folder.stem.removeprefix(_mark(target)))
        live = folder.with_suffix(".partial") in _live
        if folder.suffix in KINDS and owner and not live and not _alive(int(owner[1])):
            found.append(folder)
    return found


def _adopt(target: Path, folder: Path, key: str) -> None:
    """Links the shards of the run with this key that has finished most, and their journal, into our folder."""
    others = [left for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial") if left != folder]
    most = max(others, key=lambda left: len(finished(left, key)), default=folder)
    with suppress(FileNotFoundError, PermissionError):  # its owner published or removed it meanwhile, or keeps it
        for name in finished(most, key):
            (folder / JOURNAL).mkdir(exist_ok=True)
            for file in (Path(name), Path(JOURNAL, f"{name}.json")):
                try:
                    os.link(most / file, folder / file)
                except FileNotFoundError:
                    raise
                except OSError:  # a filesystem without links
                    shutil.copyfile(most / file, folder / file)


def _clear(target: Path, trash: Path) -> None:
    """Removes what killed processes left; an older target that one of them moved aside in vain comes back."""
    for left in abandoned(target):
        with suppress(FileNotFoundError):  # another process cleared it first
            if left.suffix == ".old" and not target.exists():
                left.rename(target)
                continue
            left.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def _publish(folder: Path, target: Path, overwrite: bool) -> None:
    old, trash = folder.with_suffix(".old"), folder.with_suffix(".trash")
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


def _mark(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}-"


def _alive(process: int) -> bool:
    """Whether another process has this id; ours is not one, so that what had it before us counts as dead."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
