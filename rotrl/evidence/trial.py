"""One expert on trial: the weights of a variant, put into a model in memory or, one at a time, onto the disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotrl.align.data import Rollout
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.sidecar import copy_sidecars
from rotrl.checkpoint.writer import write_weights
from rotrl.errors import CheckpointError
from rotrl.evidence.divergence import Divergence, load_model
from rotrl.evidence.nulls import seeded
from rotrl.evidence.variants import Matrix, Variant, nothing
from rotrl.linalg.spectrum import basis

KEPT = 1 << 26  # entries of matrices up to which their singular bases stay in memory; beyond, each is made again


class Trial:
    """What the weights of each variant are. Models are loaded when first needed.

    A variant changes the matrices of attention and MLP, the rest is the base's; None changes all but the matrices.
    """

    def __init__(self, name: str, base: Checkpoint, expert: Checkpoint, side: str, seed: int) -> None:
        self.name, self.base, self.expert, self.side, self.seed = name, base, expert, side, seed
        roles = {key: role_of(key, info.shape) for key, info in base.tensors.items()}
        layers = 1 + max((role.layer for role in roles.values() if role.layer is not None), default=0)
        self.depths = {key: ((role.layer or 0) + 0.5) / layers for key, role in roles.items() if role.is_matrix}
        if not self.depths:
            raise CheckpointError(
                f"{base.path}: no tensor is named like a matrix of attention or MLP (..._proj.weight)"
            )
        size = sum(base.tensors[key].shape[0] * base.tensors[key].shape[1] for key in self.depths)
        self.kept: dict[str, Matrix] | None = {} if size <= KEPT else None
        self.divergence: Divergence | None = None
        self.model: Any = None
        self.state: dict[str, Tensor] = {}

    def measure(self, part: str, variant: Variant | None, rollouts: list[Rollout], batch: int) -> dict[str, Any]:
        """Energy of a part, energy of what it leaves out, and KL of the model that has it, by problem."""
        if self.divergence is None:
            self.divergence = Divergence(self.expert, rollouts, batch=batch)
            self.model = load_model(self.base)
            self.state = self.model.state_dict()
            if unknown := [key for key in self.base.tensors if key not in self.state]:
                raise CheckpointError(
                    f"{self.base.path}: tensor '{unknown[0]}' has no place in {type(self.model).__name__}; remove it"
                )
        energy = taken = total = 0.0
        for key in self.base.tensors:
            before = self.base.read(key).double()
            change = self._change(key, part, variant)
            self.state[key].copy_(before + change)
            energy += float(change.square().sum())
            if key in self.depths:
                update = self.expert.read(key).double() - before
                taken, total = taken + float((update - change).square().sum()), total + float(update.square().sum())
        kl = self.divergence.of(self.model)
        energy, taken = (value / total if total else float("nan") for value in (energy, taken))
        return {"energy": energy, "taken": taken, "kl": kl.tolist(), "tokens": self.divergence.tokens.tolist()}

    def release(self) -> None:
        """Frees the models and bases in memory: another expert or an engine that samples needs it."""
        self.kept = None if self.kept is None else {}
        self.divergence, self.model, self.state = None, None, {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def on_disk(self, part: str, variant: Variant | None, folder: Path) -> Iterator[str]:
        """The variant as a checkpoint in float32, in which no small update is lost; gives its sha256, removes it."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            shapes = {key: info.shape for key, info in self.base.tensors.items()}

            def tensor(key: str) -> Tensor:
                return (self.base.read(key).double() + self._change(key, part, variant)).float()

            sha256, _ = write_weights(folder, shapes, torch.float32, tensor)
            copy_sidecars(self.base, folder, torch.float32)
            yield sha256
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _change(self, key: str, part: str, variant: Variant | None) -> Tensor:
        if key in self.depths:
            return self._matrix(key).update(variant or nothing, seeded(self.seed, self.name, key, part))
        before = self.base.read(key).double()
        return torch.zeros_like(before) if variant else self.expert.read(key).double() - before

    def _matrix(self, key: str) -> Matrix:
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        W0 = self.base.read(key).double()
        made = Matrix(basis(W0), W0, self.expert.read(key).double() - W0, self.side, self.depths[key])
        if self.kept is not None:
            self.kept[key] = made
        return made
