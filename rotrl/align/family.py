"""What learns: a family of weights around those of the source, by one parametrisation."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotrl.align.adapter import save_oft
from rotrl.checkpoint.rotations import Delta, Rotation


class Family(nn.Module, ABC):
    """Adapted weights of `matrices`; with its first parameters a family gives the source itself.

    Matrices of one shape form a stack (k, m, n) in float32 or float64, so that a step is few batched calls whatever
    the number of layers.
    """

    def __init__(self, matrices: Mapping[str, Tensor], kinds: Iterable[Hashable] = ()):
        """`kinds`, one per matrix, keeps matrices of one shape apart."""
        super().__init__()
        self.shapes: list[tuple[str, ...]] = []  # tensor names of each stack
        groups: dict[Hashable, list[str]] = {}
        for (name, matrix), kind in zip_longest(matrices.items(), kinds):
            groups.setdefault((matrix.shape, kind), []).append(name)
        for names in groups.values():
            weights = stacked(matrices, names)
            self.register_buffer(f"weights_{len(self.shapes)}", weights, persistent=False)
            self.shapes.append(tuple(names))

    def weights(self, index: int) -> Tensor:
        """The source's weights of a stack."""
        return getattr(self, f"weights_{index}")

    @abstractmethod
    def adapt(self, index: int) -> Tensor:
        """The adapted weights of a stack."""

    def forward(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The adapted weight of every tensor, rounded to `dtype` if one is given."""
        return {
            name: weight
            for index, names in enumerate(self.shapes)
            for name, weight in zip(names, self.adapt(index).to(dtype).unbind(), strict=True)
        }

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def prior(self) -> Tensor:
        """What the fit adds to the loss, times `angle_prior`."""
        return self.weights(0).new_zeros(())

    def drift(self) -> float:
        """Distance from the manifold that the parameters live on."""
        return 0.0

    def measures(self) -> dict[str, Tensor]:
        """Figures of the learning curve. `change`: |adapted - source| / |source| over all matrices."""
        moved = torch.stack([(self.adapt(i) - self.weights(i)).square().sum() for i in range(len(self.shapes))]).sum()
        whole = torch.stack([self.weights(i).square().sum() for i in range(len(self.shapes))]).sum()
        return {"change": (moved / whole).sqrt()}

    @torch.no_grad()
    def export(self) -> Mapping[str, Rotation | Delta]:
        """What leads from the source to the adapted weight of every tensor."""
        return {
            name: Delta(delta)
            for index, names in enumerate(self.shapes)
            for name, delta in zip(names, (self.adapt(index) - self.weights(index)).unbind(), strict=True)
        }

    def save_adapter(self, folder: Path, source: str | None, block: int | None = None) -> None:
        """Writes a PEFT adapter; ConfigError where PEFT has none of the kind."""
        save_oft(folder, self.export(), source, block=block, weights=self.sources())

    def sources(self) -> dict[str, Tensor]:
        """The source's weight of every tensor."""
        return {
            name: weight
            for index, names in enumerate(self.shapes)
            for name, weight in zip(names, self.weights(index), strict=True)
        }

    def details(self) -> dict[str, dict[str, float]]:
        """Further columns of align.csv by tensor."""
        return {}


def stacked(matrices: Mapping[str, Tensor], names: list[str] | tuple[str, ...]) -> Tensor:
    """(k, m, n) in float32, or float64 if the matrices are."""
    stack = torch.stack([matrices[name] for name in names])
    return stack.to(torch.promote_types(stack.dtype, torch.float32))
