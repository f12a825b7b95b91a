"""A checkpoint folder, headers first: every fault that a header can show is found before a weight is read."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rotrl.checkpoint.header import TensorInfo, config_faults, read_json, tensors_of
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.model_config import REMEDIES, config_differences, tied
from rotrl.checkpoint.tokens import token_faults
from rotrl.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A validated local checkpoint; tensors are read one at a time and in name order.

    `derived` maps names to functions of the stored tensor (an adapter's delta, padding); `tokenizer` is the folder of
    the tokenizer if it is not `path`; where `finite` is false, NaN and Inf are read as they are; `origin` is the folder
    that was given where `path` holds a copy of what is read of it.
    """

    path: Path
    config: dict
    tensors: dict[str, TensorInfo]
    stamps: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    tokenizer: Path | None = None
    finite: bool = True
    origin: Path | None = None

    def read(self, name: str) -> Tensor:
        """The tensor in its dtype, own memory. Raises CheckpointError on NaN or Inf unless these are allowed."""
        tensor = self.view(name).clone()
        if self.finite and tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{self.tensors[name].file}: tensor '{name}' holds {count} NaN or Inf of {tensor.numel()} values; "
                "use a checkpoint with finite weights, or nonfinite=allow"
            )
        return tensor

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over names and `tensor_digest`s: the same however the weights are sharded."""
        return weights_digest({name: tensor_digest(self.view(name)) for name in self.tensors})

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer or self.path

    @property
    def given(self) -> Path:
        return self.origin or self.path

    def view(self, name: str) -> Tensor:
        """The tensor unchecked. As the file holds it its pages are read when touched and are no memory of our own."""
        info = self.tensors[name]
        try:
            if self.stamps.get(info.file, ()) not in ((), stamp(info.file)):
                raise CheckpointError(f"{info.file}: tensor '{name}': the file changed while it was used; run again")
            with safe_open(info.file, framework="pt") as handle:
                tensor = handle.get_tensor(info.stored or name)
        except (SafetensorError, OSError, RuntimeError) as error:  # torch's, of a file that is too short
            if info.file.is_file():
                check_unchanged([self])
            raise CheckpointError(f"{info.file}: tensor '{name}' can't be read ({error}); get it again") from error
        return self.derived[name](tensor) if name in self.derived else tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as safetensors stores them."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> bytes:
    """BLAKE3 of a tensor's dtype, shape and bytes: SHA-256 would take more time than the arithmetic of a merge."""
    digest = tensor_hash(tensor)
    digest.update(tensor_bytes(tensor))
    return digest.digest()


def tensor_hash(tensor: Tensor) -> blake3:
    """The BLAKE3 of a tensor before its bytes."""
    return blake3(f"{tensor.dtype} {list(tensor.shape)}".encode())


def weights_digest(digests: Mapping[str, bytes]) -> str:
    """The sha256 of a checkpoint from the digests of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(digests):
        digest.update(json.dumps(name).encode() + digests[name])
    return digest.hexdigest()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a local folder with config.json and safetensors; one CheckpointError lists every fault of every file."""
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: model folder {found}; give a local folder with config.json and *.safetensors")
    config, faults = {}, []
    try:
        config = read_json(path / "config.json")
        faults += config_faults(path / "config.json", config)
    except CheckpointError as error:
        faults.append(str(error))
    tensors, wrong = tensors_of(path)
    if faults + wrong:
        raise CheckpointError("; ".join(faults + wrong))
    stamps = {info.file: stamp(info.file) for info in tensors.values()}
    return _with_one_head(Checkpoint(path, config, tensors, stamps))


def named(model: Checkpoint, module: str) -> str | None:
    """The name of a checkpoint's embedding or head; None without."""
    return next((name for name, info in model.tensors.items() if role_of(name, info.shape).module == module), None)


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


def check_unchanged(models: Iterable[Checkpoint]) -> None:
    """Raises one CheckpointError that lists every file that is not what it was when its model was opened.

    `view` tells it of what is read later; a file may change while its last tensors are still in use.
    """
    stamps = {file: before for model in models for file, before in model.stamps.items()}
    if changed := [file for file, before in stamps.items() if not file.is_file() or stamp(file) != before]:
        raise CheckpointError("; ".join(f"{file}: the file changed while it was used; run again" for file in changed))


def _with_one_head(model: Checkpoint) -> Checkpoint:
    """Drops the copy of the embedding that some tools store as the head of a tied model.

    CheckpointError where config and tensors disagree: one engine would load the head, another the embedding.
    """
    head, embedding = named(model, "head"), named(model, "embedding")
    one = tied(model.config)
    if one is False and embedding and not head:
        raise CheckpointError(
            f"{model.path / 'config.json'}: tie_word_embeddings is false and no file holds a head such as "
            "'lm_head.weight'; get the missing tensor or set it to true"
        )
    if not (one and head and embedding):
        return model
    if not torch.equal(model.view(head), model.view(embedding)):
        raise CheckpointError(
            f"{model.tensors[head].file}: tensor '{head}' differs from '{embedding}' and config.json ties them "
            "(tie_word_embeddings is true); set it to false or remove the head"
        )
    kept = {name: info for name, info in model.tensors.items() if name != head}
    return Checkpoint(model.path, model.config, kept, model.stamps)


def _differences(base: Checkpoint, expert: Checkpoint) -> list[str]:
    problems = config_differences(base.config, expert.config)
    problems += [f"tensor '{name}' is missing" for name in base.tensors if name not in expert.tensors]
    problems += [f"tensor '{name}' is not in the base" for name in expert.tensors if name not in base.tensors]
    problems += [
        f"tensor '{name}' has shape {list(info.shape)}, base has {list(base.tensors[name].shape)} ({info.file})"
        + (f" ({REMEDIES['vocab_size']})" if role_of(name, info.shape).module in ("embedding", "head") else "")
        for name, info in expert.tensors.items()
        if name in base.tensors and info.shape != base.tensors[name].shape
    ]
    return problems + token_faults(base.tokenizer_folder, expert.tokenizer_folder, chosen=False)


def stamp(file: Path) -> tuple[int, ...]:
    """What changes when a file does: size, time, inode."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
