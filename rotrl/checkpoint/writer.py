"""Weights in safetensors shards, written as they come, and the manifest by which every byte of a folder is known."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from rotrl.checkpoint import files as steps
from rotrl.checkpoint.files import file_sha256, whole_file
from rotrl.checkpoint.header import DTYPES, INDEX
from rotrl.checkpoint.reader import tensor_bytes, tensor_hash, weights_digest
from rotrl.checkpoint.staging import JOURNAL, finished

MANIFEST = "rotrl_manifest.json"
SEAL = "manifest_sha256"
SHARD_SIZE = 5 * 10**9
BEHIND = 8 << 20  # bytes that wait to be written: few enough to wait in the cache
FLUSHED = 64 << 20
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Entries = dict[str, dict[str, Any]]


class Ledger(Protocol):
    """What the caller counts while tensors are made; with each finished shard its `state` goes to the journal."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor_of: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    key: str | None = None,
    ledger: Ledger | None = None,
) -> tuple[str, Entries]:
    """Streams the tensors into shards as they come; gives the weights' sha256 and the manifest's entries of the files.

    `tensor_of(name)` is called once per tensor, shard by shard, and gives it whole or as consecutive pieces of rows;
    shape and dtype must be the given ones. With a `key` finished shards are journalled; those that a killed run with
    the same key left are kept if their bytes are right, and `ledger` is set to its state after the last of them.
    """
    meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    # Not its split_torch_state_dict_into_shards, which spends 5 s on importing torch.distributed.
    plan = split_state_dict_into_shards_factory(
        meta,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    shards = {file: {name: meta[name] for name in names} for file, names in plan.filename_to_tensors.items()}
    entries = _kept(folder, shards, key, ledger)
    for file, tensors in shards.items():
        if file not in entries:
            entries[file] = _write_shard(folder / file, tensors, tensor_of)
            if key is not None:
                (folder / JOURNAL).mkdir(exist_ok=True)
                state = ledger.state() if ledger else None
                write_json(folder / JOURNAL / f"{file}.json", {"key": key, "entry": entries[file], "state": state})
    digests = {name: bytes.fromhex(found) for entry in entries.values() for name, found in entry["blake3"].items()}
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    return weights_digest(digests), entries


def shard_fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What of a shard is not as its manifest's entry says, None if every byte is."""
    with path.open("rb") as stream:
        length = int.from_bytes(head := stream.read(8), "little")
        # A wrong byte may ask for 2**56, which no memory holds.
        text = stream.read(length) if length < path.stat().st_size else b""
        if hashlib.sha256(head + text).hexdigest() != entry["header_sha256"]:
            return "its header has other bytes than were written"
        buffer = memoryview(bytearray(1 << 20))
        for name, info in json.loads(text).items():
            if name == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            digest = tensor_hash(torch.empty(info["shape"], dtype=DTYPES[info["dtype"]], device="meta"))
            for at in range(begin, end, len(buffer)):
                read = stream.readinto(buffer[: min(len(buffer), end - at)])
                digest.update(buffer[:read])
            if digest.hexdigest() != entry["blake3"].get(name):
                return f"tensor '{name}' has other bytes than were written"
    return None


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    """The last file of a checkpoint: `content`, and of each file its size and sha256.

    Of a shard it is the sha256 of its header and the BLAKE3 of each of its tensors, which tell a wrong one by name.
    """
    listed = {
        file.name: {"bytes": file.stat().st_size, **(files.get(file.name) or {"sha256": file_sha256(file)})}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    whole = {**content, "files": listed}
    write_json(folder / MANIFEST, {**whole, SEAL: _seal(whole)})


def sealed_manifest(folder: Path) -> dict | None:
    """The manifest of a folder, None if any byte of it is not as written."""
    text = (Path(folder) / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    whole = {key: value for key, value in manifest.items() if key != SEAL}
    return manifest if manifest.get(SEAL) == _seal(whole) and text == _text(manifest) else None


def valid_manifest(folder: Path) -> dict | None:
    """The manifest of a published checkpoint whose files are there in their sizes; None for anything else.

    Cheap, so that a finished merge is reused at once; `verify` hashes the bytes.
    """
    try:
        manifest = sealed_manifest(folder)
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()} if manifest else {}
        if manifest and all((Path(folder) / name).stat().st_size == size for name, size in sizes.items()):
            return manifest
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return None


def write_json(path: Path, content: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(_text(content), encoding="utf-8")


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _kept(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], key: str | None, ledger: Ledger | None) -> Entries:
    """The entries of the first shards as far as a run with this key finished them and their bytes are right."""
    left, kept, state = finished(folder, key), {}, None
    for file, tensors in shards.items():
        path, entry = folder / file, left.get(file, {}).get("entry")
        if entry is None or entry["header_sha256"] != hashlib.sha256(_header(tensors)).hexdigest():
            break
        if not path.is_file() or shard_fault(path, entry):
            break
        kept[file], state = entry, left[file]["state"]
    for file in left:
        if file not in kept:
            (folder / file).unlink(missing_ok=True)
            (folder / JOURNAL / f"{file}.json").unlink()
    if kept and ledger:
        ledger.load(state)
    return kept


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The safetensors format by hand, because save_file wants all tensors of a shard in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    path: Path, tensors: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor | Iterable[Tensor]]
) -> dict[str, Any]:
    """The shard's entry for the manifest. Bytes are hashed and written on a second thread, while the next are made."""
    header, digests = _header(tensors), {name: tensor_hash(expected) for name, expected in tensors.items()}
    with whole_file(path) as temporary, temporary.open("wb", buffering=0) as stream, _behind() as submit:
        submit(len(header), lambda: _write(stream, memoryview(header)))
        for name, expected in tensors.items():
            given, rows = tensor_of(name), 0
            for part in [given] if isinstance(given, Tensor) else given:
                assert (part.shape[1:], part.dtype) == (expected.shape[1:], expected.dtype), name
                submit(part.nbytes, partial(_write, stream, tensor_bytes(part), digests[name]))
                rows += len(part) if part.ndim else 1
            assert rows == (len(expected) if expected.ndim else 1), name
            submit(0, partial(steps.step, f"{path.name} holds {name}"))
    return {
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "blake3": {name: digest.hexdigest() for name, digest in digests.items()},
    }


def _write(stream: FileIO, content: memoryview, digest: blake3 | None = None) -> None:
    if digest is not None:
        digest.update(content)
    begin = stream.tell()
    while content:
        content = content[stream.write(content) :]
    # Written pages go to the disk now and leave the cache, where they would push out the inputs of the merge.
    if begin // FLUSHED != stream.tell() // FLUSHED:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _behind() -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Gives submit(size, work): done in order on another thread, which lags by BEHIND bytes or one tensor at most."""
    pending: deque[tuple[int, Future[None]]] = deque()
    waiting = 0

    def finish_first() -> None:
        nonlocal waiting
        size, work = pending.popleft()
        work.result()
        waiting -= size

    with ThreadPoolExecutor(1) as pool:

        def submit(size: int, work: Callable[[], None]) -> None:
            nonlocal waiting
            waiting += size
            pending.append((size, pool.submit(work)))
            while len(pending) > 1 and (waiting > BEHIND or pending[0][1].done()):
                finish_first()

        yield submit
        while pending:
            finish_first()
