"""How large a merge is beside its experts, and what storing it loses. Pooled over tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Measure:
    """Gathers inner products of `d_i = W_i - W0` and `d = W - W0` tensor by tensor."""

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = list(experts)
        self.gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        self.products = torch.zeros(len(experts), dtype=torch.float64)
        self.energy = 0.0
        self.lost = 0.0

    def add(self, base: Tensor, experts: Sequence[Tensor], merged: Tensor, stored: Tensor) -> None:
        """Adds a tensor or some rows: base, experts and merge in float32, and the merge in the dtype that is stored."""
        vectors = [(tensor - base).flatten() for tensor in (*experts, merged)]
        for i, x in enumerate(vectors[:-1]):
            for j, y in enumerate(vectors[: i + 1]):
                product = float(torch.dot(x, y))
                self.gram[i, j] += product
                if i != j:
                    self.gram[j, i] += product
            self.products[i] += float(torch.dot(x, vectors[-1]))
        self.energy += float(torch.dot(vectors[-1], vectors[-1]))
        lost = (stored.to(merged) - merged).flatten()
        self.lost += float(torch.dot(lost, lost))

    def norm_of(self, expert: str) -> float:
        """|d_i| of an expert."""
        return float(self.gram.diagonal()[self.experts.index(expert)]) ** 0.5

    @property
    def effective_coefficient(self) -> float:
        """c of the least squares `d = c sum d_i`: 1 for task arithmetic at scale 1, 1/T for the average."""
        total = float(self.gram.sum())
        return float(self.products.sum()) / total if total > 1e-12 * float(self.gram.trace()) else 0.0

    @property
    def coefficients(self) -> dict[str, float]:
        """c_i of the least squares `d = sum c_i d_i`, of least norm where experts are dependent."""
        solution = torch.linalg.pinv(self.gram, hermitian=True) @ self.products
        return dict(zip(self.experts, solution.tolist(), strict=True))

    @property
    def norm_ratio(self) -> float:
        """|d| / mean |d_i|."""
        mean = float(self.gram.diagonal().sqrt().mean())
        return self.energy**0.5 / mean if mean else 0.0

    @property
    def storage_loss(self) -> float:
        """|stored - W| / |d|: the part of the update that the stored dtype rounds away."""
        return (self.lost / self.energy) ** 0.5 if self.energy else 0.0
