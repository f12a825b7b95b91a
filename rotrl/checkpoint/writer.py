"""A checkpoint appears whole or not at all: built in a staging folder beside the target, published by rename."""

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from rotrl.checkpoint import files as steps
from rotrl.checkpoint.files import file_sha256, fsync, whole_file
from rotrl.checkpoint.header import DTYPES, INDEX
from rotrl.checkpoint.reader import tensor_bytes, tensor_hash, weights_digest
from rotrl.errors import CheckpointError

MANIFEST = "rotrl_manifest.json"
SEAL = "manifest_sha256"
SHARD_SIZE = 5 * 10**9
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class AlreadyPublished(Exception):
    """Another process has published the target meanwhile."""


@contextmanager
def staging(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `target`; on success it becomes `target`, on any error nothing remains of it.

    An existing target is replaced only if `overwrite`, and kept until the new one is whole. AlreadyPublished where
    another process was faster; CheckpointError where the disk refuses.
    """
    target = Path(target).absolute()
    folder = target.with_name(f"{_mark(target)}{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        folder.mkdir()
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
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor_of: Callable[[str], Tensor | Iterable[Tensor]],
) -> tuple[str, dict[str, str]]:
    """Streams the tensors into shards as they come; gives the weights' sha256 and each file's.

    `tensor_of(name)` is called once per tensor, shard by shard, and gives it whole or as consecutive pieces of rows;
    shape and dtype must be the given ones.
    """
    meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    # Not its split_torch_state_dict_into_shards, which spends 5 s on importing torch.distributed.
    plan = split_state_dict_into_shards_factory(
        meta,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    digests: dict[str, bytes] = {}
    files = {}
    for file, names in plan.filename_to_tensors.items():
        files[file] = _write_shard(folder / file, {name: meta[name] for name in names}, tensor_of, digests)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
        files[INDEX] = file_sha256(folder / INDEX)
    return weights_digest(digests), files


def write_manifest(folder: Path, files: Mapping[str, str], content: Mapping[str, Any]) -> None:
    """The last file of a checkpoint: `content` and the size and sha256 of each file in the folder."""
    listed = {
        file.name: {"bytes": file.stat().st_size, "sha256": files.get(file.name) or file_sha256(file)}
        for file in sorted(folder.iterdir())
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


def _write_shard(
    path: Path,
    meta: Mapping[str, Tensor],
    tensor_of: Callable[[str], Tensor | Iterable[Tensor]],
    digests: dict[str, bytes],
) -> str:
    """The safetensors format by hand, because save_file wants all tensors of a shard in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in meta.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            stream.write(chunk)
        for name, expected in meta.items():
            given = tensor_of(name)
            own, rows = tensor_hash(expected), 0
            for part in [given] if isinstance(given, Tensor) else given:
                assert (part.shape[1:], part.dtype) == (expected.shape[1:], expected.dtype), name
                content = tensor_bytes(part)
                digest.update(content)
                own.update(content)
                stream.write(content)
                rows += len(part) if part.ndim else 1
            assert rows == (len(expected) if expected.ndim else 1), name
            steps.step(f"{path.name} holds {name}")
            digests[name] = own.digest()
    return digest.hexdigest()


def _publish(folder: Path, target: Path, overwrite: bool) -> None:
    old = folder.with_suffix(".old")
    try:
        if overwrite:
            with suppress(FileNotFoundError):
                target.rename(old)
            steps.step("old moved aside")
        folder.rename(target)  # replaces no folder that holds anything
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise AlreadyPublished(target) from error
        raise
    steps.step("published")
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    steps.step("old removed")


def _remove_abandoned(target: Path) -> None:
    """Folders that killed processes of this machine left beside the target; one moved aside in vain comes back."""
    for folder in target.parent.glob(f"{glob.escape(_mark(target))}*"):
        process, _, kind = folder.name.removeprefix(_mark(target)).partition(".")
        if kind in ("partial", "old") and process.isdigit() and not _alive(int(process)):
            if kind == "old" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder)


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
