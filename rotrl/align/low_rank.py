"""Rotations that turn few dimensions, for sides too wide for a dense one."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rotrl.align.parametrization import Action, Turns
from rotrl.align.sharing import DENSE
from rotrl.errors import ConfigError


class LowRankTurns(Turns):
    """`R = exp(A B^T - B A^T)` with A and B (d, rank): turns in at most `2 rank` dimensions, `2 d rank` parameters.

    With M = [A, B] and J = [[0, I], [-I, 0]] the generator is M J M^T, so `R = I + M phi(J M^T M) J M^T`,
    `phi(z) = (exp z - 1) / z`: the exponential is that of a matrix of size 2 rank, and no (d, d) matrix is formed
    before the export.
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], *, side: str = "small", rank: int = 4, share: str = "none", seed: int = 0
    ):
        if rank < 1:
            raise ConfigError(f"align.rank={rank}; give a rank of at least 1")
        self.rank, self.random = rank, torch.Generator().manual_seed(seed)
        super().__init__(matrices, side=side, share=share)

    def blocks(self, d: int, block: int | None, name: str) -> int:
        return 1

    def begin(self, k: int, blocks: int, d: int, like: Tensor) -> None:
        a = torch.randn(k, d, self.rank, generator=self.random, dtype=like.dtype).to(like) / d**0.5
        self.rotations.append(nn.Parameter(torch.stack([a, torch.zeros_like(a)], 1)))

    def factors(self, stack: int) -> tuple[Tensor, Tensor]:
        """(k, d, 2 rank) and (k, 2 rank, d) whose product is R - I."""
        a, b = self.rotations[stack].unbind(1)
        m, j = torch.cat([a, b], -1), torch.cat([b, -a], -1).mT  # j = J M^T
        small = j @ m
        eye = torch.eye(small.shape[-1]).to(small)
        upper, zeros = torch.cat([small, eye.expand_as(small)], -1), torch.zeros_like(small).repeat(1, 1, 2)
        phi = torch.linalg.matrix_exp(torch.cat([upper, zeros], -2))[..., : len(eye), len(eye) :]
        return m @ phi, j

    def matrix(self, stack: int) -> Tensor:
        u, v = self.factors(stack)
        return torch.eye(u.shape[-2]).to(u) + u @ v

    def adapt(self, index: int) -> Tensor:
        weights = self.weights(index)
        for action in self.acting[index]:
            weights = weights + self._moved(weights, action)
        return weights

    def _moved(self, weights: Tensor, action: Action) -> Tensor:
        """`(R - I) W` or `W (R - I)`, by the factors of R - I."""
        u, v = (part[list(action.rows)] for part in self.factors(action.stack))
        if action.inverse:
            u, v = v.mT, u.mT
        return u @ (v @ weights) if action.side == "left" else (weights @ u) @ v

    def closed_form(self, *args: Any, **kwargs: Any) -> list[Tensor] | None:
        """None where a rotation is too wide to be dense: Procrustes knows no other."""
        wide = any(part.shape[-2] > DENSE for part in self.rotations)
        return None if wide else super().closed_form(*args, **kwargs)

    def dimensions(self) -> int:
        return sum(part.numel() // (2 * self.rank) for part in self.rotations)

    def squared_angle(self) -> Tensor:
        parts = [self.factors(stack) for stack in range(len(self.stacks))]
        return torch.stack([((u.mT @ u) * (v @ v.mT)).sum() for u, v in parts]).sum()

    def measures(self) -> dict[str, Tensor]:
        return {"angle_rms": self.rms_angle().rad2deg()}

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """The generator of a first step has rms angle sqrt(2 rank) times the step of an entry of B."""
        return [{"params": list(self.rotations), "lr": lr / math.sqrt(2 * self.rank)}]
