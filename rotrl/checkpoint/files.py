"""Files that are either whole or absent: temporary name, fsync, rename, the mode that the umask asks for."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def step(name: str) -> None:
    """Called at every step of writing; tests put in its place what fails there."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it is fsynced and renamed to `path`, on error removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        step(f"{path.name} written")
        # safetensors creates files as 0600, which would lock a group out of a shared folder.
        temporary.chmod(0o666 & ~_umask())
        fsync(temporary)
        step(f"{path.name} synced")
        temporary.replace(path)
        step(f"{path.name} renamed")
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
