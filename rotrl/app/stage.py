"""Stages with content keys: a stage that is done is not done twice, and nothing half-done looks done.

A stage's key is the digest of its resolved inputs and of the source of the packages that compute it. Its files are
made in `run_dir/.work/`, published to `cache_dir/<stage>/<key>/` by one rename, and linked into the run folder.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import rotrl

SUMMARY = "stage.json"


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@cache
def source_digest(packages: tuple[str, ...]) -> str:
    """sha256 over the source files of `rotrl.<package>`: an edited kernel never answers with an old result."""
    root = Path(rotrl.__file__).parent
    state = hashlib.sha256(rotrl.__version__.encode())
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            state.update(path.read_bytes())
    return state.hexdigest()


class Stages:
    """Runs stages and keeps what the record says of them: key, seconds, reused."""

    def __init__(self, cache_dir: Path, run_dir: Path, log: Callable[[str], None]) -> None:
        self.cache_dir, self.run_dir, self.log = cache_dir, run_dir, log
        self.done: dict[str, dict[str, Any]] = {}

    def run(
        self, name: str, inputs: Any, packages: Iterable[str], produce: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """The stage's summary; its files appear in the run folder.

        `produce(folder)` writes files into `folder` and returns a JSON summary. After an interruption it is called
        again with the same folder, so that it can continue from what it left there.
        """
        key = digest([name, inputs, source_digest(tuple(packages))])
        published = self.cache_dir / name / key[:16]
        start = time.monotonic()
        reused = (published / SUMMARY).is_file()
        if reused:
            self.log(f"{name}: done before, reused ({key[:12]})")
        else:
            work = self.run_dir / ".work" / f"{name}-{key[:16]}"
            work.mkdir(parents=True, exist_ok=True)
            try:
                _write_json(work / SUMMARY, produce(work))
                _publish(work, published)
            except FileNotFoundError:
                if not (published / SUMMARY).is_file():  # else another run of this stage took the folder along
                    raise
            with contextlib.suppress(OSError):  # another stage of this run was interrupted and left its work there
                work.parent.rmdir()
        summary = json.loads((published / SUMMARY).read_text())
        self._link(published)
        self.record(name, key, time.monotonic() - start, reused=reused)
        return summary

    def record(self, name: str, key: str, seconds: float, *, reused: bool) -> None:
        self.done[name] = {"key": key, "seconds": round(seconds, 3), "reused": reused}

    def _link(self, published: Path) -> None:
        for source in sorted(published.rglob("*")):
            if source.is_dir() or source.name == SUMMARY:
                continue
            target = self.run_dir / source.relative_to(published)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                os.link(source, temporary)
            except OSError:  # another filesystem, or one without hard links
                shutil.copy2(source, temporary)
            temporary.replace(target)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())


def _publish(work: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        work.rename(target)
    except OSError:
        if (target / SUMMARY).is_file():  # another process published the same content first
            shutil.rmtree(work)
            return
        staging = target.with_name(f".{target.name}.{os.getpid()}")  # the cache is on another filesystem
        shutil.copytree(work, staging)
        staging.rename(target)
        shutil.rmtree(work)
