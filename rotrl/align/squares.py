"""Objectives that are squares of the weights: no sample passes through a model while they are minimised."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from rotrl.align.data import Batch, Rollout
from rotrl.align.gram import gather
from rotrl.align.module import LogitAlignment
from rotrl.align.source import Problem
from rotrl.checkpoint.grams import open_grams
from rotrl.errors import CheckpointError


class WeightAlignment(LogitAlignment):
    """Minimises `sum |adapted - T|^2 / sum |source - T|^2` over all matrices, T the teachers' mean by `mix`.

    For rotations of one side Procrustes has the answer (`Turns.closed_form`): the check of the optimiser. Minimises
    no KL; where there are samples it is measured all the same.
    """

    def aim(self, problem: Problem, samples: Mapping[str, Sequence[Rollout]], trainer: Mapping[str, Any]) -> None:
        """Takes the targets: (weight, T, metric of the inputs) of every term of every matrix."""
        sources = self.family.sources()
        self.terms = {name: [(1.0, problem.target(name).to(weight.dtype), None)] for name, weight in sources.items()}

    def objective(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.exactly():
            if self.whole is None:
                self.whole = self.distance(self.family.sources())
            loss = self.distance(self.family()) / self.whole.clamp(min=torch.finfo(self.whole.dtype).tiny)
        return loss, {"distance": loss.detach()}

    def distance(self, weights: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name, terms in self.terms.items():
            for weight, target, metric in terms:
                d = weights[name] - target
                parts.append(weight * (d * (d if metric is None else d @ metric)).sum())
        return torch.stack(parts).sum()

    terms: dict[str, list[tuple[float, Tensor, Tensor | None]]]
    whole: Tensor | None = None

    def move(self) -> None:
        if self.heldout:  # only their KL asks the models anything
            super().move()
        for name, terms in self.terms.items():
            self.terms[name] = [(w, t.to(self.device), m if m is None else m.to(self.device)) for w, t, m in terms]


class ActivationAlignment(WeightAlignment):
    """Minimises `sum_k mix_k |(adapted - T_k) X_k|^2` over all matrices as a share of that of the source.

    X_k are the inputs of the linear map in teacher k on its own samples, by their Gram matrix C_k = X_k X_k^T / tokens
    (`gram.gather`), which takes 4 n^2 bytes for n inputs. Where outputs are rotated the answer is the polar factor of
    `sum_k mix_k T_k C_k W^T`; rotations of inputs have to be learned.
    """

    def aim(self, problem: Problem, samples: Mapping[str, Sequence[Rollout]], trainer: Mapping[str, Any]) -> None:
        sources = self.family.sources()
        self.terms = {name: [] for name in sources}
        for teacher, model in problem.teachers.items():
            with TemporaryDirectory() as folder:
                gather(model, samples[teacher], Path(folder, "grams"), trainer=trainer)
                grams = open_grams(Path(folder, "grams"))
                for name, weight in sources.items():
                    if (metric := grams.get(name)) is None:
                        raise CheckpointError(
                            f"{model.path}: no inputs of '{name}' were found; use align.objective=logits"
                        )
                    term = (problem.mix[teacher], model.read(name).to(weight.dtype), metric.clone().to(weight.dtype))
                    self.terms[name].append(term)
