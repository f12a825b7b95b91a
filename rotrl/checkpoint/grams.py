"""Gram matrices of what the linear maps of a model read, in shards like a checkpoint's, with what they are of beside.

Tensors that read one input (q, k and v; gate and up) share one entry.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rotrl.checkpoint.header import read_json, tensors_of
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, stamp
from rotrl.errors import CheckpointError

GRAMS = "grams.json"
SHARED = {"k": "q", "v": "q", "up": "gate"}  # module -> the one whose input it reads


@dataclass(frozen=True)
class Grams:
    """`entries` maps a tensor to the entry that holds its Gram matrix, `weights` is the sha256 of the model."""

    files: Checkpoint
    entries: dict[str, str]
    weights: str
    tokens: int
    sha256: str

    def get(self, name: str) -> Tensor | None:
        """`X^T X / tokens` (in, in), X the inputs of the linear map `name`, a row a token; None where not gathered."""
        return self.files.view(self.entries[name]) if name in self.entries else None


def open_grams(folder: Path) -> Grams:
    """Opens a folder of Gram matrices; CheckpointError names what is absent or broken."""
    told: dict[str, Any] = read_json(folder / GRAMS)
    tensors, faults = tensors_of(folder)
    stamps = {info.file: stamp(info.file) for info in tensors.values()}
    try:
        entries: dict[str, str] = told["entries"]
        faults += [f"{folder}: entry '{entry}' is absent" for entry in {*entries.values()} - tensors.keys()]
        if not faults:
            files = Checkpoint(folder, {}, tensors, stamps)
            return Grams(files, entries, told["weights"], told["tokens"], told["sha256"])
    except (KeyError, AttributeError, TypeError) as error:
        faults.append(f"{folder / GRAMS}: lacks {error}")
    raise CheckpointError(f"{'; '.join(faults)}; delete the folder, and the run gathers them again")


def planned_sizes(base: Checkpoint) -> dict[int | None, int]:
    """Bytes of the Gram matrices (float32) of each layer, as far as names tell which tensors share an input."""
    entries: dict[tuple[int | None, str], int] = {}
    for name, info in base.tensors.items():
        role = role_of(name, info.shape)
        if role.is_matrix:
            module = name if role.module == "linear" else SHARED.get(role.module, role.module)
            entries[role.layer, module] = 4 * math.prod((info.shape[1], info.shape[1]))
    layers = {layer for layer, _ in entries}
    return {layer: sum(size for (where, _), size in entries.items() if where == layer) for layer in layers}
