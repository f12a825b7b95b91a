"""What the files of a checkpoint claim to hold, read without a weight; faults are listed, not raised one by one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rotrl.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LARGEST = 100_000_000  # bytes of a header: the limit of the format's own library
PICKLES = ("*.bin", "*.pt", "*.pth")
QUANTISED = (".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax")

_ODD_NAME = re.compile(r"[^\x21-\x7e]|[/\\]|\.\.")


def word_of(dtype: torch.dtype) -> str:
    """A dtype as configurations write it: float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorInfo:
    """`stored` is the name in `file`, where it differs from the tensor's own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    stored: str | None = None


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError names the file if it is absent, broken or has a key twice."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: does not exist; the folder must hold a Hugging Face checkpoint") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def config_faults(path: Path, config: dict) -> list[str]:
    """Quantised weights and code of the model's own, told by config.json."""
    faults = []
    if "quantization_config" in config:
        settings = config["quantization_config"]
        kind = settings.get("quant_method") or settings.get("fmt") if isinstance(settings, dict) else None
        faults.append(
            f"{path}: quantised weights ({kind or 'of unknown kind'}) are codes and scales that can't be merged; "
            "give the unquantised model"
        )
    if "auto_map" in config:
        faults.append(
            f"{path}: 'auto_map' asks for Python code from the model's folder, which is never run; "
            "remove the key if transformers knows the architecture"
        )
    return faults


def tensors_of(path: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Every tensor of a folder by its headers, and every fault of its index and weight files."""
    files, faults = _weight_files(path)
    tensors: dict[str, TensorInfo] = {}
    for file, names in files.items():
        header, wrong = read_header(file)
        faults += wrong
        if names is not None and not wrong and (odd := sorted(names ^ header.keys())):
            told = ", ".join(f"'{name}' is {'absent' if name in names else 'not in the index'}" for name in odd)
            faults.append(f"{file}: differs from {INDEX}: {told}; download the checkpoint again")
        for name in sorted(tensors.keys() & header.keys()):
            faults.append(f"{file}: tensor '{name}' is in {tensors[name].file.name} as well; keep one")
        tensors |= header
    if not tensors and not faults:
        faults.append(f"{path}: holds no tensor; download the checkpoint again")
    return dict(sorted(tensors.items())), faults


def _weight_files(path: Path) -> tuple[dict[Path, set[str] | None], list[str]]:
    """Weight file -> the names that the index puts there (None without an index)."""
    index, single = path / INDEX, path / "model.safetensors"
    if index.exists() and single.exists():
        return {}, [f"{path}: both {single.name} and {INDEX} are there, which one loads differs; remove one"]
    if single.is_symlink() or single.exists():
        outside = _outside(path, single)
        return ({}, [outside]) if outside else ({single: None}, [])
    if not index.exists():
        pickles = sorted(file.name for suffix in PICKLES for file in path.glob(suffix))
        found = f"found {pickles[0]}, a pickle, which can run code" if pickles else "found none"
        return {}, [f"{path}: safetensors weights are needed, {found}; save the model with safetensors"]
    try:
        weight_map = read_json(index).get("weight_map")
    except CheckpointError as error:
        return {}, [str(error)]
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{index}: 'weight_map' is absent or empty; download it again"]
    files: dict[Path, set[str] | None] = {}
    faults = []
    for shard in sorted(set(map(str, weight_map.values()))):
        names = {name for name, file in weight_map.items() if file == shard}
        first = f"tensor '{min(names, default='?')}'"
        if shard != Path(shard).name or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            faults.append(f"{index}: {first}: {shard!r} is not a plain file name; download it again")
        elif outside := _outside(path, path / shard):
            faults.append(outside)
        elif not (path / shard).is_file():
            faults.append(f"{index}: {first}: shard '{shard}' does not exist; download it")
        else:
            files[path / shard] = names
    return files, faults


def _outside(folder: Path, file: Path) -> str | None:
    """A link may lead to a blob of the same hub cache entry, nowhere else."""
    if not file.is_symlink():
        return None
    root = next((p for p in folder.absolute().parents if p.name.startswith("models--")), folder).resolve()
    target = file.resolve()
    if target.is_relative_to(root):
        return None
    return f"{file}: is a link out of its folder, to {target}; put the file itself there"


def read_header(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of one safetensors file, and its faults."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if LARGEST < length <= file.stat().st_size:
                raise ValueError(f"its header is {length / 1e6:.0f} MB, at most {LARGEST / 1e6:.0f} MB are read")
            with safe_open(file, framework="pt"):  # checks lengths, offsets and coverage
                pass
            # safetensors keeps the last of two equal names in silence
            header = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
    except PermissionError:
        return {}, [f"{file}: may not be read; give yourself the right to it (chmod)"]
    except (SafetensorError, OSError, ValueError) as error:
        return {}, [f"{file}: not a whole safetensors file{_hint(file)} ({error}); get it again"]
    header.pop("__metadata__", None)
    faults = [
        f"{file}: tensor {name!r} has a name that no module has (space, control character, slash or '..'); rename it"
        for name in header
        if _ODD_NAME.search(name)
    ]
    if foreign := {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in DTYPES}:
        told = ", ".join(f"tensor '{name}' is {dtype}" for name, dtype in list(foreign.items())[:3])
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        faults.append(f"{file}: {told}{more}, weights must be {', '.join(DTYPES)}{_codes(header)}")
    elif packed := [name for name in header if name.endswith(QUANTISED)]:
        faults.append(f"{file}: tensor '{packed[0]}' belongs to quantised weights; give the unquantised model")
    return {
        name: TensorInfo(tuple(entry["shape"]), DTYPES.get(entry["dtype"], torch.uint8), file)
        for name, entry in header.items()
    }, faults


def _codes(header: dict[str, Any]) -> str:
    quantised = any(name.endswith(QUANTISED) for name in header)
    return (
        " (GPTQ, AWQ, int4 or fp8 codes); give the unquantised model" if quantised else "; give the unquantised model"
    )


def _hint(file: Path) -> str:
    """What a file that is no safetensors file looks like, from its first bytes."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
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
