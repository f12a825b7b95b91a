"""A checkpoint folder, headers first: every fault that a header can show is found before a weight is read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rotrl.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


@dataclass(frozen=True)
class Checkpoint:
    """A validated local checkpoint; tensors are read one at a time and in name order."""

    path: Path
    config: dict
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, own memory. Raises CheckpointError on NaN or Inf."""
        tensor = self._view(name).clone()
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{self.tensors[name].file}: tensor '{name}' holds {count} NaN or Inf of {tensor.numel()} values; "
                "use a checkpoint with finite weights"
            )
        return tensor

    @cached_property
    def sha256(self) -> str:
        """Digest of names, dtypes, shapes and bytes: the same however the weights are sharded."""
        return weights_digest({name: tensor_digest(self._view(name)) for name in self.tensors})

    def _view(self, name: str) -> Tensor:
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor '{name}' can't be read ({error})") from error


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as safetensors stores them."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.digest()


def weights_digest(digests: Mapping[str, bytes]) -> str:
    """The sha256 of a checkpoint from those of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(digests):
        digest.update(json.dumps(name).encode() + digests[name])
    return digest.hexdigest()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a local folder with config.json and safetensors; raises CheckpointError that names the faulty file."""
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: model folder {found}; give a local folder with config.json and *.safetensors")
    config = read_json(path / "config.json")
    if "quantization_config" in config:
        raise CheckpointError(f"{path / 'config.json'}: quantised weights can't be merged; give the unquantised model")
    tensors: dict[str, TensorInfo] = {}
    for file, names in _weight_files(path).items():
        header = _header(file)
        if names is not None and (wrong := sorted(names ^ header.keys())):
            told = "; ".join(f"'{name}' is {'absent' if name in names else 'not in the index'}" for name in wrong)
            raise CheckpointError(f"{file}: differs from {INDEX}: {told}; download the checkpoint again")
        if twice := sorted(tensors.keys() & header.keys()):
            raise CheckpointError(f"{file}: '{twice[0]}' is in {tensors[twice[0]].file.name} as well; keep one")
        tensors |= header
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor; download the checkpoint again")
    return Checkpoint(path, config, dict(sorted(tensors.items())))


def check_family(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
    """Raises one CheckpointError that lists every way in which the experts do not fit the base."""
    problems = [
        f"expert '{name}' ({expert.path}): {problem}"
        for name, expert in experts.items()
        for problem in _differences(base, expert)
    ]
    if problems:
        raise CheckpointError(
            f"models do not fit the base {base.path}: {'; '.join(problems)}; give experts trained from this base"
        )


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError names the file if it is absent or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: does not exist; the folder must hold a Hugging Face checkpoint") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def _differences(base: Checkpoint, expert: Checkpoint) -> list[str]:
    problems = [
        f"config {key}={expert.config.get(key)!r}, base has {base.config.get(key)!r}"
        for key in SIZES
        if expert.config.get(key) != base.config.get(key)
    ]
    problems += [f"tensor '{name}' is missing" for name in base.tensors if name not in expert.tensors]
    problems += [f"tensor '{name}' is not in the base" for name in expert.tensors if name not in base.tensors]
    problems += [
        f"tensor '{name}' has shape {list(info.shape)}, base has {list(base.tensors[name].shape)}"
        for name, info in expert.tensors.items()
        if name in base.tensors and info.shape != base.tensors[name].shape
    ]
    tokens, base_tokens = _tokens(expert.path), _tokens(base.path)
    if tokens and base_tokens and tokens != base_tokens:
        changed = sorted(token for token, _ in tokens.items() ^ base_tokens.items())
        problems.append(f"tokenizer.json gives another id to {len(set(changed))} tokens, first {changed[0]!r}")
    return problems


def _tokens(path: Path) -> dict[str, int]:
    """The token -> id map of tokenizer.json, empty where there is none."""
    file = path / "tokenizer.json"
    if not file.exists():
        return {}
    content = read_json(file)
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram models list [token, score] pairs by id
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """Weight file -> the names that the index puts there (None without an index)."""
    index, single = path / INDEX, path / "model.safetensors"
    if index.exists() and single.exists():
        raise CheckpointError(f"{path}: both {single.name} and {INDEX} are there, which one loads differs; remove one")
    if single.exists():
        return {single: None}
    if not index.exists():
        pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in path.glob(suffix))
        found = f"found {pickles[0]}, a pickle, which can run code" if pickles else "found none"
        raise CheckpointError(f"{path}: safetensors weights are needed, {found}; save the model with safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is absent or empty; download it again")
    files: dict[Path, set[str] | None] = {}
    problems = []
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard != Path(shard).name or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            problems.append(f"'{shard}' is not a plain file name")
        elif not (path / shard).is_file():
            problems.append(f"shard '{shard}' does not exist")
        files[path / shard] = {name for name, file in weight_map.items() if file == shard}
    if problems:
        raise CheckpointError(f"{index}: {'; '.join(problems)}; download the checkpoint again")
    return files


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt"):  # checks lengths, offsets and coverage
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # safetensors keeps the last of two equal names in silence
            header = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file{_hint(file)} ({error}); get it again") from error
    header.pop("__metadata__", None)
    found = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    if foreign := {name: dtype for name, (_, dtype) in found.items() if dtype not in DTYPES}:
        told = "; ".join(f"'{name}' is {dtype}" for name, dtype in foreign.items())
        raise CheckpointError(f"{file}: {told}; weights must be one of {', '.join(DTYPES)}")
    return {name: TensorInfo(shape, DTYPES[dtype], file) for name, (shape, dtype) in found.items()}


def _hint(file: Path) -> str:
    """What a file that is no safetensors file looks like, from its first bytes."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return ", it is a Git LFS pointer (run `git lfs pull`)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return ", it is an HTML page"
    if start.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")):
        return ", it looks like a pickle"
    if len(start) < 8:
        return f", it has only {len(start)} bytes"
    if int.from_bytes(start[:8], "little") > file.stat().st_size - 8:
        return ", its header is longer than the file"
    return ""


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' occurs twice")
    return content
