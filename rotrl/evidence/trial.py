"""One expert on trial: the weights of a variant, put into a model in memory or, one at a time, onto the disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotrl.align.data import Rollout
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.sidecar import copy_sidecars
from rotrl.checkpoint.writer import write_weights
from rotrl.errors import CheckpointError
from rotrl.evidence.bases import Bases
from rotrl.evidence.divergence import Divergence, load_model
from rotrl.evidence.nulls import seeded
from rotrl.evidence.variants import Matrix, Variant, nothing
from rotrl.linalg.spectrum import Basis
from rotrl.memory import free_gpu_memory

CHUNK = 1 << 20  # entries in float64 at a time


class Made(NamedTuple):
    """A tensor of a variant; of a matrix ||C||^2, ||D - C||^2 and ||D||^2 of its change C and the expert's D too."""

    weights: Tensor
    energy: float = 0.0
    taken: float = 0.0
    total: float = 0.0


class Trial:
    """What the weights of each variant are. Models are loaded when first needed, onto the GPU where there is one.

    A variant changes the matrices of attention and MLP, the rest is the base's; None changes all but the matrices.
    """

    def __init__(self, name: str, base: Checkpoint, expert: Checkpoint, side: str, seed: int, bases: Bases) -> None:
        self.name, self.side, self.seed, self.bases = name, side, seed, bases
        self.models = {"base": base, "expert": expert}
        self.depths = depths(base)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.divergence: Divergence | None = None
        self.model: Any = None
        self.state: dict[str, Tensor] = {}

    def measure(self, part: str, variant: Variant | None, rollouts: list[Rollout], batch: int) -> dict[str, Any]:
        """Energy of a part, energy of what it leaves out, and KL of the model that has it, by problem."""
        divergence = self.divergence or self._load(rollouts, batch)
        energy = taken = total = 0.0
        for key in self.models["base"].tensors:
            made = self._made(key, part, variant)
            self.state[key].copy_(made.weights)
            energy, taken, total = energy + made.energy, taken + made.taken, total + made.total
        kl = divergence.of(self.model)
        energy, taken = (value / total if total else float("nan") for value in (energy, taken))
        return {"energy": energy, "taken": taken, "kl": kl.tolist(), "tokens": divergence.tokens.tolist()}

    def _load(self, rollouts: list[Rollout], batch: int) -> Divergence:
        base = self.models["base"]
        self.divergence = Divergence(self.models["expert"], rollouts, batch=batch)
        self.model = load_model(base)
        self.state = self.model.state_dict()
        if unknown := [key for key in base.tensors if key not in self.state]:
            kind = type(self.model).__name__
            raise CheckpointError(f"{base.path}: tensor '{unknown[0]}' has no place in {kind}; remove it")
        return self.divergence

    def release(self) -> None:
        """Frees the models in memory: another expert or an engine that samples needs it."""
        self.divergence, self.model, self.state = None, None, {}
        free_gpu_memory()

    @contextmanager
    def on_disk(self, part: str, variant: Variant | None, folder: Path) -> Iterator[str]:
        """The variant as a checkpoint in float32, in which no small update is lost; gives its sha256, removes it."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            base = self.models["base"]
            shapes = {key: info.shape for key, info in base.tensors.items()}

            def tensor(key: str) -> Tensor:
                return self._made(key, part, variant).weights.float().cpu()

            sha256, _ = write_weights(folder, shapes, torch.float32, tensor)
            copy_sidecars(base, folder, torch.float32)
            yield sha256
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _made(self, key: str, part: str, variant: Variant | None) -> Made:
        before, after = (model.read(key) for model in self.models.values())
        if key not in self.depths:
            return Made(before) if variant else Made(after, energy=_squared_distance(before, after))
        before, after = (W.to(self.device).double() for W in (before, after))
        update = after - before

        def decomposed(which: str, W: Tensor) -> Basis:
            return self.bases.of(f"{self.models[which].sha256}/{key}", W)

        matrix = Matrix(before, update, self.side, self.depths[key], decomposed)
        change = matrix.update(variant or nothing, seeded(self.seed, self.name, key, part, device=self.device))
        energies = (float(M.square().sum()) for M in (change, update - change, update))
        return Made(before + change, *energies)


def _squared_distance(a: Tensor, b: Tensor) -> float:
    """||A - B||^2 in float64, in chunks: an embedding is large."""
    chunks = zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True)
    return sum(float((y.double() - x.double()).square().sum()) for x, y in chunks)


def depths(base: Checkpoint) -> dict[str, float]:
    """Where the layer of each matrix of attention and MLP lies in the model, 0 to 1. CheckpointError without any."""
    roles = {key: role_of(key, info.shape) for key, info in base.tensors.items()}
    layers = 1 + max((role.layer for role in roles.values() if role.layer is not None), default=0)
    found = {key: ((role.layer or 0) + 0.5) / layers for key, role in roles.items() if role.is_matrix}
    if not found:
        raise CheckpointError(f"{base.path}: no tensor is named like a matrix of attention or MLP (..._proj.weight)")
    return found
