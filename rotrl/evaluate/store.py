"""Append-only JSON lines with a checksum each: what was written survives a kill, what was damaged is done again.

store = Store(folder)
store.get(key)                      a row that this or any earlier process appended, or None
store.append([(key, row), ...])     one write
"""

import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError

Row = dict[str, Any]
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_HEAD, _SUM = len('{"crc32":"'), len('{"crc32":"00000000",')


class Store:
    """The rows of every `*.jsonl` in a folder, by key. Each process appends to a file of its own.

    A last line without its end was cut off by a kill and is ignored. Any other line whose checksum fails is copied to
    `<file>.quarantine` and counted in `damaged`; its key is missing, so the caller makes the row again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged = 0
        self._rows: dict[str, Row] = {}
        self._descriptor: int | None = None
        for file in sorted(folder.glob("*.jsonl")):
            self._rows.update(self._read(file))

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Row | None:
        return self._rows.get(key)

    def append(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Keep rows for ever. EvaluationError names the file when the disk does not take them."""
        rows = list(rows)
        data = b"".join(encode(key, row) for key, row in rows)
        try:
            descriptor = self._open()
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            self.close()
            raise EvaluationError(
                f"{self.folder}: samples can't be written ({error}); free space and run again"
            ) from error
        self._rows.update(rows)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        return self._descriptor

    def _read(self, file: Path) -> Iterator[tuple[str, Row]]:
        bad = []
        with file.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                decoded = decode(line)
                if decoded is None:
                    bad.append(line)
                else:
                    yield decoded
        if bad:
            self.damaged += len(bad)
            file.with_name(f"{file.name}.quarantine").write_bytes(b"".join(bad))


def encode(key: str, row: Row) -> bytes:
    """`{"crc32":"1234abcd","key":...,"row":...}`; the checksum is that of the bytes after it."""
    body = _ENCODER.encode({"key": key, "row": row})[1:].encode()
    return b'{"crc32":"%08x",%b\n' % (zlib.crc32(body), body)


def decode(line: bytes) -> tuple[str, Row] | None:
    """Key and row of a line, None where its checksum or form is wrong."""
    body = line[_SUM:-1]
    if line[_HEAD : _HEAD + 8] != b"%08x" % zlib.crc32(body):
        return None
    try:
        record = json.loads(b"{" + body)
        return record["key"], record["row"]
    except (ValueError, KeyError):
        return None
