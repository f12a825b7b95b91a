"""Families that are no rotations, each the control of what a rotation contributes. W is the source's weight."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rotrl.align.adapter import save_lora
from rotrl.align.family import Family, stacked
from rotrl.errors import ConfigError


class LowRank(Family):
    """`W + B A` with A (rank, in) and B (out, rank): LoRA at alpha = rank, begun as PEFT does. arXiv 2106.09685.

    A is uniform within 1 / sqrt(in), B zero.
    """

    def __init__(self, matrices: Mapping[str, Tensor], *, rank: int = 4, seed: int = 0):
        super().__init__(matrices)
        if rank < 1:
            raise ConfigError(f"align.rank={rank}; give a rank of at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for index in range(len(self.shapes)):
            k, m, n = self.weights(index).shape
            uniform = torch.rand(k, rank, n, generator=generator, dtype=self.weights(index).dtype)
            self.a.append(nn.Parameter((2 * uniform.to(self.weights(index)) - 1) / n**0.5))
            self.b.append(nn.Parameter(self.weights(index).new_zeros(k, m, rank)))

    def adapt(self, index: int) -> Tensor:
        return torch.baddbmm(self.weights(index), self.b[index], self.a[index])

    @torch.no_grad()
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of every tensor, copied."""
        return {
            name: (self.a[index][row].clone(), self.b[index][row].clone())
            for index, names in enumerate(self.shapes)
            for row, name in enumerate(names)
        }

    def save_adapter(self, folder: Path, source: str | None, block: int | None = None) -> None:
        if block:
            raise ConfigError(f"align.adapter_block={block}: a LoRA adapter has no blocks; leave it out")
        save_lora(folder, self.factors(), source)


class Free(Family):
    """`W + D` with every entry of D free: no constraint at all."""

    def __init__(self, matrices: Mapping[str, Tensor]):
        super().__init__(matrices)
        stacks = (self.weights(index) for index in range(len(self.shapes)))
        self.deltas = nn.ParameterList(nn.Parameter(torch.zeros_like(stack)) for stack in stacks)

    def adapt(self, index: int) -> Tensor:
        return self.weights(index) + self.deltas[index]


class Directions(Family):
    """`W + sum_j c_j D_j`: one scalar per matrix and fixed direction, zero at first.

    directions: {label: {tensor: D}}. Task vectors of the experts give learned coefficients; the first-order rotations
    of their sum and the rest of it give split task arithmetic.
    """

    def __init__(self, matrices: Mapping[str, Tensor], directions: Mapping[str, Mapping[str, Tensor]]):
        super().__init__(matrices)
        self.labels = tuple(directions)
        self.coefficients = nn.ParameterList()
        for index, names in enumerate(self.shapes):
            fixed = torch.stack([stacked(directions[label], names) for label in self.labels])
            self.register_buffer(f"directions_{index}", fixed.to(self.weights(index)), persistent=False)
            self.coefficients.append(nn.Parameter(self.weights(index).new_zeros(len(self.labels), len(names))))

    def adapt(self, index: int) -> Tensor:
        step = torch.einsum("jk,jkmn->kmn", self.coefficients[index], getattr(self, f"directions_{index}"))
        return self.weights(index) + step

    def details(self) -> dict[str, dict[str, float]]:
        """The scalars, by the label of their direction."""
        return {
            name: dict(zip(self.labels, values.tolist(), strict=True))
            for index, names in enumerate(self.shapes)
            for name, values in zip(names, self.coefficients[index].detach().T, strict=True)
        }
