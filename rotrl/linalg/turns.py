"""Rotations R of a base W0 on its right and what they do to it: `W0 (R - I)`, without ever forming a large R.

All rotations of the experts move a few rows F only, `R - I = F^T X F`, and so do their generators, `Q = F^T theta F`.
Of a tall W0 (m, n), n <= m, F is a square basis. Of a wide one F holds the row space V^T of W0 and the rows that each
expert has beside it, so that products of X and theta go through the Gram matrix of these. Batch dimensions first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.linalg import rotation
from rotrl.linalg.cayley import cayley
from rotrl.linalg.procrustes import polar


class Turn(NamedTuple):
    """theta (..., p, p) of a generator, or X of R - I: all of it, or its rows of V (..., r, p).

    `of` are the experts whose rows, after those of V, the p rows are.
    """

    theta: Tensor
    of: tuple[int, ...] = ()


class Turns(NamedTuple):
    """Cayley generators Q_k of the experts, `R_k = (I - Q_k)^{-1} (I + Q_k)`, and the rows F in which they are given.

    F are the r orthonormal rows `frame` = V^T (..., r, n), then of each expert the r = m rows `B_k = D_k - T_k V^T` of
    its update, orthogonal to V, with the Gram matrix gram (..., p - r, p - r). left (..., m, r) is W0 V, or W0 itself
    if V is `square`.
    """

    left: Tensor
    frame: Tensor
    gram: Tensor
    generators: list[Turn]
    square: bool = False
    updates: Sequence[Tensor] = ()
    coefficients: Sequence[Tensor] = ()

    @property
    def rank(self) -> int:
        return self.frame.shape[-2]

    def combined(self, turns: Sequence[Turn], weights: Sequence[float] | None = None) -> Turn:
        """`sum w_k theta_k` in the rows of all experts, w_k = 1 by default."""
        first, size = turns[0].theta, self.rank + self.gram.shape[-1]
        full = first.shape[-2] > self.rank
        total = first.new_zeros(*first.shape[:-2], size if full else self.rank, size)
        for turn, weight in zip(turns, weights or [1.0] * len(turns), strict=True):
            columns = self._rows(turn.of)
            rows = columns if full else columns[: self.rank]
            total[..., rows[:, None], columns] += weight * turn.theta
        return Turn(total, tuple(range(self.gram.shape[-1] // self.rank)))

    def length(self, turn: Turn) -> Tensor:
        """Frobenius norm of a generator, shape (..., 1, 1)."""
        r, gram = self.rank, self._gram(turn)
        a, y, x = turn.theta[..., :r, :r], turn.theta[..., :r, r:], turn.theta[..., r:, r:]
        square = a.square().sum((-2, -1), keepdim=True) + 2 * (y @ gram * y).sum((-2, -1), keepdim=True)
        if x.any():
            inner = gram @ x
            square = square - (inner * inner.mT).sum((-2, -1), keepdim=True)
        return square.clamp(min=0).sqrt()

    def cayley(self, turn: Turn) -> Turn:
        """Rows of V in `(I - Q)^{-1} (I + Q) - I`, by the Schur complement of what lies beside V."""
        r, gram = self.rank, self._gram(turn)
        a, y, x = turn.theta[..., :r, :r], turn.theta[..., :r, r:], turn.theta[..., r:, r:]
        through = y
        if x.any():
            through = torch.linalg.solve(_eye(x) - gram @ x, y, left=False)
        a = a - through @ gram @ y.mT
        return Turn(2 * torch.linalg.solve(_eye(a) - a, torch.cat([a, through], -1)), turn.of)

    def inverse_cayley(self, whole: Turn) -> Turn:
        """The generator `(R + I)^{-1} (R - I)` of all rows of R - I."""
        theta = torch.linalg.solve(2 * _eye(whole.theta) + _times(whole.theta, self._gram(whole)), whole.theta)
        return Turn((theta - theta.mT) / 2, whole.of)

    def whole(self, turn: Turn) -> Turn:
        """All rows of `(I - Q)^{-1} (I + Q) - I`."""
        theta = turn.theta
        return Turn(2 * torch.linalg.solve(_eye(theta) - _times(theta, self._gram(turn)), theta), turn.of)

    def log(self, turn: Turn) -> Turn:
        """A with `exp(A) = (I - Q)^{-1} (I + Q)`: `2 atanh(Q) = 2 (Q + Q^3/3 + ...)`, of large Q by eigenvectors."""
        theta, gram = turn.theta, self._gram(turn)
        if not self.gram.shape[-1] and theta.norm() > 0.5:
            return Turn(rotation.log(cayley(theta)), turn.of)
        factor = _times(theta, gram)
        factor, term, total = factor @ factor, theta, theta
        for order in range(3, 200, 2):
            term = factor @ term
            total = total + term / order
            if _negligible(term, total):
                return Turn(2 * total, turn.of)
        raise NumericsError("a rotation by about 90 degrees or more; use a larger anchor")

    def exp(self, turn: Turn, *, rows: int | None = None) -> Turn:
        """Rows of V (or `rows`) in `exp(A) - I`, by the power series, of large A by eigenvectors."""
        theta, gram = turn.theta, self._gram(turn)
        if not self.gram.shape[-1] and theta.norm() > 1:
            return Turn(rotation.exp(theta) - _eye(theta), turn.of)
        term = total = theta[..., : rows or self.rank, :]
        for order in range(2, 200):
            term = _times(term, gram) @ theta / order
            total = total + term
            if _negligible(term, total):
                return Turn(total, turn.of)
        raise NumericsError("a generator too large for its exponential; use a smaller scale")

    def compose(self, first: Turn, second: Turn) -> Turn:
        """All rows of `R S - I` from those of R - I and S - I, both in the rows of all experts."""
        x, y = first.theta, second.theta
        return Turn(x + y + _times(x, self.gram) @ y, first.of)

    def polar(self, whole: Turn) -> Turn:
        """`polar(I + F^T X F) - I` by Newton-Schulz steps."""
        x = whole.theta
        if not self.gram.shape[-1]:
            return Turn(polar(x + _eye(x)) - _eye(x), whole.of)
        for _ in range(50):
            error = x + x.mT + _times(x.mT, self.gram) @ x
            x = x - (error + _times(x, self.gram) @ error) / 2
            if error.norm() ** 2 <= torch.finfo(x.dtype).eps * x.norm():
                return Turn(x, whole.of)
        raise NumericsError("rotations too far apart for a mean; use a larger anchor")

    def move(self, turn: Turn) -> Tensor:
        """`W0 (R - I)` (..., m, n) from the rows of V in R - I."""
        theta = turn.theta[..., : self.rank, :]
        if self.square:
            return self.left @ (self.frame.mT @ theta @ self.frame)
        head, *parts = (self.left @ theta).split(self.rank, -1)
        for part, k in zip(parts, turn.of, strict=True):
            head = head - part @ self.coefficients[k]
        moved = head @ self.frame
        for part, k in zip(parts, turn.of, strict=True):
            moved = moved + part @ self.updates[k]
        return moved

    def _rows(self, of: tuple[int, ...]) -> Tensor:
        r = self.rank
        return torch.cat([torch.arange(r) + r * k for k in (0, *(k + 1 for k in of))]).to(self.frame.device)

    def _gram(self, turn: Turn) -> Tensor:
        beside = self._rows(turn.of)[self.rank :] - self.rank
        return self.gram[..., beside[:, None], beside]


def _times(theta: Tensor, gram: Tensor) -> Tensor:
    """theta F F^T."""
    r = theta.shape[-1] - gram.shape[-1]
    return torch.cat([theta[..., :r], theta[..., r:] @ gram], -1) if gram.shape[-1] else theta


def _negligible(term: Tensor, total: Tensor) -> bool:
    return bool(term.norm() <= torch.finfo(term.dtype).eps * total.norm())


def _eye(m: Tensor) -> Tensor:
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
