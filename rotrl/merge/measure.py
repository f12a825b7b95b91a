"""How large a merge is beside its experts, and what storing it loses. Pooled over tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Measure:
    """Gathers inner products of `d_i = W_i - W0` and `d = W - W0` tensor by tensor."""

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = list(experts)
        self.tensors = 0
        self.inner = [[0.0] * (i + 1) for i in range(len(experts) + 1)]  # of d_1, ..., d_T, d
        self.lost = 0.0

    def add(self, base: Tensor, experts: Sequence[Tensor], merged: Tensor, stored: Tensor) -> None:
        """Adds a tensor or some rows: base, experts and merge as computed, and the merge as it is stored."""
        vectors = [(tensor - base).flatten() for tensor in (*experts, merged)]
        for i, row in enumerate(self.inner):
            for j in range(i + 1):
                row[j] += float(torch.dot(vectors[i], vectors[j]))
        if stored.dtype != merged.dtype:
            lost = (stored.to(merged) - merged).flatten()
            self.lost += float(torch.dot(lost, lost))

    def include(self, other: "Measure") -> None:
        """Adds what another has gathered of one more tensor."""
        self.inner = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.inner, other.inner, strict=True)]
        self.lost += other.lost
        self.tensors += 1

    def state(self) -> dict[str, Any]:
        """All that is gathered, for JSON; `load` goes on from there."""
        return {"inner": self.inner, "lost": self.lost, "tensors": self.tensors}

    def load(self, state: Mapping[str, Any]) -> None:
        self.inner, self.lost, self.tensors = state["inner"], state["lost"], state["tensors"]

    @property
    def gram(self) -> Tensor:
        """<d_i, d_j> in float64."""
        count = range(len(self.experts))
        return torch.tensor([[self.inner[max(i, j)][min(i, j)] for j in count] for i in count], dtype=torch.float64)

    @property
    def products(self) -> Tensor:
        """<d_i, d>."""
        return torch.tensor(self.inner[-1][:-1], dtype=torch.float64)

    @property
    def energy(self) -> float:
        """|d|^2."""
        return self.inner[-1][-1]

    def norm_of(self, expert: str) -> float:
        """|d_i| of an expert."""
        i = self.experts.index(expert)
        return self.inner[i][i] ** 0.5

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
