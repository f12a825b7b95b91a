"""What an alignment learned, one entry per tensor in float32, with what it applies to in the metadata.

rotations.safetensors holds rotations, whole ones or frames, deltas.safetensors differences to the weights that the
alignment began from.
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
from rotrl.linalg.frames import towards
from rotrl.linalg.rotation import geodesic

SIDES = ("left", "right")
DELTA = "delta"


@dataclass(frozen=True)
class Rotation:
    """`left @ W @ right` for W (out=m, in=n): left is (m, m), right (n, n), None stands for the identity.

    A side of the shape of a W that is not square holds a frame, which takes the place of that of W and stands for the
    smallest rotation between both (`linalg.frames`).
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def apply(self, weight: Tensor, t: float = 1.0) -> Tensor:
        """The rotated weight, in float32 or better; `left^t W right^t`, in float64, on the way. Raises like `log`."""
        whole = torch.float32 if t == 1 else torch.float64
        weight = weight.to(torch.promote_types(weight.dtype, whole))
        if self.left is not None:
            weight = _turned(weight, self.left.to(weight), t)
        if self.right is not None:
            weight = _turned(weight.mT, self.right.to(weight).mT, t).mT
        return weight.contiguous()


def _turned(weight: Tensor, left: Tensor, t: float) -> Tensor:
    if is_frame(left):
        return towards(weight.double(), left.double(), t).to(weight)
    return (left if t == 1 else geodesic(left, t)) @ weight


def is_frame(side: Tensor) -> bool:
    """Whether a side of a rotation is given by a frame."""
    return side.shape[-2] != side.shape[-1]


@dataclass(frozen=True)
class Delta:
    """`W + delta`, of one shape with W."""

    delta: Tensor

    def apply(self, weight: Tensor, t: float = 1.0) -> Tensor:
        """The changed weight, in float32 or better; `W + t delta` on the way."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight + t * self.delta.to(weight)


@dataclass(frozen=True)
class RotationsFile:
    """An open file of rotations or deltas; they are read when asked for."""

    path: Path
    metadata: dict[str, str]
    sides: dict[str, dict[str, tuple[int, ...]]]  # tensor -> side -> shape: square, or that of the tensor for a frame
    deltas: dict[str, tuple[int, ...]]  # tensor -> shape of its delta

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that have rotations or deltas."""
        return (*self.sides, *self.deltas)

    @property
    def source(self) -> dict:
        """The weights that they apply to: {"model": "base"}, {"expert": name} or {"merge": config}."""
        return json.loads(self.metadata["source"])

    def get(self, name: str) -> Rotation | Delta | None:
        """What was learned of the tensor `name`, None where that is nothing."""
        return Delta(**self._read(name, [DELTA])) if name in self.deltas else self.rotation(name)

    def rotation(self, name: str) -> Rotation | None:
        """The rotation of the tensor `name`, None where it has none."""
        return Rotation(**self._read(name, self.sides[name])) if name in self.sides else None

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
        elif kind in SIDES and (len(shape) != 2 or shape[SIDES.index(kind)] < max(shape)):
            problems.append(f"'{entry}' has shape {list(shape)}, a square matrix or a frame is expected")
    try:
        json.loads(metadata["source"])
    except (KeyError, ValueError):
        problems.append("metadata 'source' is absent or not JSON")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}; run the alignment again")
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    deltas: dict[str, tuple[int, ...]] = {}
    for entry in sorted(shapes):
        name, _, kind = entry.rpartition(".")
        if kind == DELTA:
            deltas[name] = shapes[entry]
        else:
            sides.setdefault(name, {})[kind] = shapes[entry]
    return RotationsFile(path, metadata, sides, deltas)
