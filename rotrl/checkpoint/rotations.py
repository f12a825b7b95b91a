"""What an alignment learned, one entry per tensor in float32, with what it applies to in the metadata.

rotations.safetensors holds rotations, deltas.safetensors differences to the weights that the alignment began from.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotrl.checkpoint.files import whole_file
from rotrl.errors import CheckpointError

SIDES = ("left", "right")
DELTA = "delta"


@dataclass(frozen=True)
class Rotation:
    """`left @ W @ right` for W (out=m, in=n): left is (m, m), right (n, n), None stands for the identity."""

    left: Tensor | None = None
    right: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """The rotated weight, in float32 or better."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.left is not None:
            weight = self.left.to(weight) @ weight
        if self.right is not None:
            weight = weight @ self.right.to(weight)
        return weight


@dataclass(frozen=True)
class Delta:
    """`W + delta`, of one shape with W."""

    delta: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight, in float32 or better."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight + self.delta.to(weight)


@dataclass(frozen=True)
class RotationsFile:
    """An open file of rotations or deltas; they are read when asked for."""

    path: Path
    metadata: dict[str, str]
    sizes: dict[str, dict[str, int]]  # tensor -> side -> dimensions
    shapes: dict[str, tuple[int, ...]]  # tensor -> shape of its delta

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that have rotations or deltas."""
        return (*self.sizes, *self.shapes)

    @property
    def source(self) -> dict:
        """The weights that they apply to: {"model": "base"}, {"expert": name} or {"merge": config}."""
        return json.loads(self.metadata["source"])

    def get(self, name: str) -> Rotation | Delta | None:
        """What was learned of the tensor `name`, None where that is nothing."""
        if name in self.shapes:
            return Delta(**self._read(name, [DELTA]))
        return Rotation(**self._read(name, self.sizes[name])) if name in self.sizes else None

    def _read(self, name: str, kinds: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as handle:
            found = {kind: handle.get_tensor(f"{name}.{kind}").clone() for kind in kinds}
        for kind, matrix in found.items():
            if not matrix.isfinite().all():
                raise CheckpointError(f"{self.path}: '{name}.{kind}' holds NaN or Inf; run the alignment again")
        return found


def save_rotations(path: Path, rotations: Mapping[str, Rotation | Delta], metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all; entries `<tensor>.left` and `.right` or `<tensor>.delta`, float32."""
    entries = {
        f"{name}.{kind}": matrix.detach().to("cpu", torch.float32).contiguous()
        for name, rotation in rotations.items()
        for kind in (*SIDES, DELTA)
        if (matrix := getattr(rotation, kind, None)) is not None
    }
    seen: set[int] = set()
    for entry, matrix in entries.items():
        if matrix.data_ptr() in seen:  # safetensors refuses tensors that share memory
            entries[entry] = matrix.clone()
        seen.add(matrix.data_ptr())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(entries, temporary, metadata=dict(metadata))


def open_rotations(path: Path | str) -> RotationsFile:
    """Opens and checks names, shapes and metadata; CheckpointError names the file and the entry."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: rotations file does not exist; run the align stage or give its path")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = dict(handle.metadata() or {})
            shapes = {entry: tuple(handle.get_slice(entry).get_shape()) for entry in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); run the alignment again") from error
    problems = []
    for entry, shape in shapes.items():
        kind = entry.rpartition(".")[2]
        if kind not in (*SIDES, DELTA):
            problems.append(f"'{entry}' does not end in .left, .right or .delta")
        elif kind in SIDES and (len(shape) != 2 or shape[0] != shape[1]):
            problems.append(f"'{entry}' has shape {list(shape)}, a square matrix is expected")
    try:
        json.loads(metadata["source"])
    except (KeyError, ValueError):
        problems.append("metadata 'source' is absent or not JSON")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}; run the alignment again")
    sizes: dict[str, dict[str, int]] = {}
    deltas: dict[str, tuple[int, ...]] = {}
    for entry in sorted(shapes):
        name, _, kind = entry.rpartition(".")
        if kind == DELTA:
            deltas[name] = shapes[entry]
        else:
            sizes.setdefault(name, {})[kind] = shapes[entry][0]
    return RotationsFile(path, metadata, sizes, deltas)
