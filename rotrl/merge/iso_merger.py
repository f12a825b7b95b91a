"""ISO-Merger: the singular frames move as the experts' frames do, the singular values stay the base's. 2607.19331."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rotrl.errors import ConfigError
from rotrl.merge.linear import weighted_sum
from rotrl.merge.types import Equivariant, NonNegative, Share

NULL = 1e-7


class Frames(NamedTuple):
    """A tall base `W0 = U diag(s) V^T` and its updates d_i in these frames, all (n, n) and float64; U is W0 V / s.

    T_i = U^T d_i V, and `beyond` (i, j) is `V^T d_i^T (I - U U^T) d_j V`, what lies beyond the span of U. `inverse` is
    1/s, 0 where s vanishes.
    """

    V: Tensor
    s: Tensor
    inverse: Tensor
    T: list[Tensor]
    beyond: list[list[Tensor]]


class Move(NamedTuple):
    """A tangent vector `U inside V^T + (I - U U^T) d_i V outside V^T` made of the update d_i."""

    inside: Tensor
    outside: Tensor


def iso_merger(
    base: Equivariant,
    experts: Sequence[Tensor],
    *,
    keep: Share = 0.9,
    ridge: NonNegative = 1e-12,
    c_max: NonNegative = 1.5,
    reproject: bool = True,
    solver: Literal["svd", "first_order"] = "svd",
) -> Tensor:
    """`polar(U0 + P_U sum c_i A_i) S0 polar(V0 + P_V sum c_i B_i)^T`. arXiv 2607.19331.

    With thin SVDs, `P_X Y = Y - X sym(X^T Y)`: `A_i = P_U0 (U_i - U0)` and `B_i = P_V0 (V_i - V0)`, the columns from
    `round(keep min(m, n))` on zero. `g_i = A_i S0 V0^T + U0 S0 B_i^T`, and c solves
    `(<g_i, g_j> + ridge I) c = <g_i, g_i>`, clipped to [0, c_max].

    `reproject` projects the cut frames on the tangent space again before the Gram matrix; as published (false) the
    coefficients of orthogonal experts scatter about 1. `solver=first_order` is `W0 + sum c_i g_i` from the frames of
    the base; there no frame turns far where singular values are close, and the base's values stay to first order.

    All decompositions are of matrices of the smaller side, in float64: of Gram matrices of the base and, in its frames,
    of the experts.
    """
    if solver == "first_order" and not reproject:
        raise ConfigError("merge.solver=first_order has no published form; use merge.reproject=true")
    wide = base.shape[0] < base.shape[1]
    w0, *ws = (w.mT if wide else w for w in (base, *experts))
    frames = _frames(w0, ws)
    cut = round(keep * len(frames.s))
    early = (torch.arange(len(frames.s), device=base.device) < cut).double()
    if solver == "first_order":
        moves = [_first_order(t, early) for t in frames.T]
        total, outside = _combined(frames, moves, ridge, c_max)
    else:
        pairs = [_turned(frames, i, early, wide=wide, reproject=reproject) for i in range(len(ws))]
        total, outside = _finite(frames, pairs, ridge, c_max)
    merged = _applied(w0, ws, frames, total, outside)
    return merged.mT.contiguous() if wide else merged


def coefficients(gram: Tensor, ridge: float, c_max: float) -> list[float]:
    """c in [0, c_max] of `(Gamma + ridge I) c = diag Gamma`, Gamma the inner products of the moves."""
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (torch.linalg.pinv(regular, hermitian=True) @ gram.diagonal()).clamp(0, c_max).tolist()


def _frames(w0: Tensor, ws: Sequence[Tensor]) -> Frames:
    exact, ds, count = w0.double(), [w - w0 for w in ws], len(ws)
    energies, V = (part.flip(-1) for part in torch.linalg.eigh(exact.mT @ exact))
    s = energies.clamp(min=0).sqrt()
    present = s > NULL * s[0]
    inverse = torch.where(present, 1 / s, 0.0)
    T = [inverse[:, None] * (V.mT @ (exact.mT @ d.double()) @ V) for d in ds]
    inside = w0.shape[0] == w0.shape[1] and bool(present.all())
    beyond = [[torch.zeros_like(V) for _ in ws] for _ in ws]
    for i in range(count if not inside else 0):
        for j in range(i + 1):
            beyond[i][j] = V.mT @ (ds[i].mT @ ds[j]).double() @ V - T[i].mT @ T[j]
            beyond[j][i] = beyond[i][j].mT
    return Frames(V, s, inverse, T, beyond)


def _turned(frames: Frames, i: int, early: Tensor, *, wide: bool, reproject: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The moves of both frames to the singular vectors of an expert, and what of d_i is added beyond U.

    Its Gram matrix in the frame V gives its right vectors, those its left ones. Each pair of singular vectors has the
    sign nearest to the base's left one, which in a transposed (`wide`) matrix is the right one here.
    """
    s, T = frames.s, frames.T[i]
    seen = torch.diag(s) + T
    energies, right = (part.flip(-1) for part in torch.linalg.eigh(seen.mT @ seen + frames.beyond[i][i]))
    values = energies.clamp(min=0).sqrt()
    scaled = right * torch.where(values > NULL * values[0], 1 / values, 0.0)
    left = seen @ scaled
    sign = torch.where((right if wide else left).diagonal() < 0, -1.0, 1.0).to(s)
    a, b = (_skew(part * sign) * early for part in (left, right))
    if reproject:
        a, b = _skew(a), _skew(b)
    return a, b, scaled * sign * early


def _finite(
    frames: Frames, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], ridge: float, c_max: float
) -> tuple[Tensor, list[Tensor]]:
    """The base with both frames moved and made orthonormal again, less the base."""
    s = frames.s
    moves = [Move(a * s + s[:, None] * b.mT, beyond * s) for a, b, beyond in pairs]
    c = coefficients(_inner(frames, moves), ridge, c_max)
    a, b = (_skew(weighted_sum([pair[k] for pair in pairs], c)) for k in range(2))
    identity = torch.eye(len(s), dtype=s.dtype, device=s.device)
    added = [weight * pair[2] for weight, pair in zip(c, pairs, strict=True)]
    square = identity - a @ a
    for i, x in enumerate(added):
        for j, y in enumerate(added):
            square = square + x.mT @ frames.beyond[i][j] @ y
    right = (identity + b) @ _inverse_root(identity - b @ b)
    values = _inverse_root(square) * s @ right.mT
    return (identity + a) @ values - torch.diag(s), [x @ values for x in added]


def _first_order(T: Tensor, early: Tensor) -> Move:
    """T with zero diagonal, entries with one index past the cut halved and with both dropped; beyond, early columns."""
    inside = T * (early[:, None] + early) / 2
    return Move(inside - torch.diag(inside.diagonal()), torch.diag(early))


def _combined(frames: Frames, moves: Sequence[Move], ridge: float, c_max: float) -> tuple[Tensor, list[Tensor]]:
    c = coefficients(_inner(frames, moves), ridge, c_max)
    inside = weighted_sum([move.inside for move in moves], c)
    return inside, [weight * move.outside for weight, move in zip(c, moves, strict=True)]


def _inner(frames: Frames, moves: Sequence[Move]) -> Tensor:
    gram = frames.s.new_empty(len(moves), len(moves))
    for i, x in enumerate(moves):
        for j, y in enumerate(moves):
            gram[i, j] = (x.inside * y.inside).sum() + (x.outside * (frames.beyond[i][j] @ y.outside)).sum()
    return gram


def _applied(w0: Tensor, ws: Sequence[Tensor], frames: Frames, inside: Tensor, outside: Sequence[Tensor]) -> Tensor:
    """`W0 + U inside V^T + sum (I - U U^T) d_i V outside_i V^T`."""
    V = frames.V
    for T, x in zip(frames.T, outside, strict=True):
        inside = inside - T @ x
    own = (V @ (frames.inverse[:, None] * inside) @ V.mT).to(w0)
    added = [(V @ x @ V.mT).to(w0) for x in outside]
    merged = w0 + w0 @ own
    for w, x in zip(ws, added, strict=True):
        merged += (w - w0) @ x
    return merged


def _skew(m: Tensor) -> Tensor:
    return (m - m.mT) / 2


def _inverse_root(m: Tensor) -> Tensor:
    """`m^(-1/2)` of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(m)
    return vectors / values.sqrt() @ vectors.mT
