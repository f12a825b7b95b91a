"""ISO-Merger: the singular frames move as the experts' frames do, the singular values stay the base's. 2607.19331."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rotrl.errors import ConfigError
from rotrl.linalg.procrustes import polar
from rotrl.merge.linear import weighted_sum
from rotrl.merge.types import Matrix, NonNegative, Share

Frames = tuple[Tensor, Tensor, Tensor]


def iso_merger(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    keep: Share = 0.9,
    ridge: NonNegative = 1e-12,
    c_max: NonNegative = 1.5,
    reproject: bool = True,
    solver: Literal["svd", "first_order"] = "svd",
) -> Tensor:
    """`polar(U0 + P_U sum c_i A_i) S0 polar(V0 + P_V sum c_i B_i)^T`, in float64. arXiv 2607.19331.

    With thin SVDs, `P_X Y = Y - X sym(X^T Y)`: `A_i = P_U0 (U_i - U0)` and `B_i = P_V0 (V_i - V0)`, the columns from
    `round(keep min(m, n))` on zero. `g_i = A_i S0 V0^T + U0 S0 B_i^T`, and c solves
    `(<g_i, g_j> + ridge I) c = <g_i, g_i>`, clipped to [0, c_max].

    `reproject` projects the cut frames on the tangent space again before the Gram matrix; as published (false) the
    coefficients of orthogonal experts scatter about 1. `solver=first_order` is `W0 + sum c_i g_i` from one SVD of the
    base; there no frame turns far where singular values are close, and the base's values stay to first order.
    """
    w0, ws = base.double(), [expert.double() for expert in experts]
    u0, s0, vh0 = torch.linalg.svd(w0, full_matrices=False)
    frames = (u0, s0, vh0.mT)
    cut = round(keep * len(s0))
    if solver == "first_order":
        if not reproject:
            raise ConfigError("merge.solver=first_order has no published form; use merge.reproject=true")
        moves = [_first_order(frames, w - w0, cut) for w in ws]
        c = coefficients(moves, ridge, c_max)
        return (w0 + weighted_sum(moves, c)).to(base)
    pairs = [_tangents(frames, w, cut, reproject) for w in ws]
    c = coefficients([(a * s0) @ vh0 + (u0 * s0) @ b.mT for a, b in pairs], ridge, c_max)
    a, b = (weighted_sum(part, c) for part in zip(*pairs, strict=True))
    u, v = polar(u0 + _project(u0, a)), polar(vh0.mT + _project(vh0.mT, b))
    return ((u * s0) @ v.mT).to(base)


def coefficients(moves: Sequence[Tensor], ridge: float, c_max: float) -> list[float]:
    """c in [0, c_max] of `(Gamma + ridge I) c = diag Gamma`, Gamma the inner products of the moves."""
    flat = torch.stack([move.flatten() for move in moves])
    gram = flat @ flat.mT
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (torch.linalg.pinv(regular, hermitian=True) @ gram.diagonal()).clamp(0, c_max).tolist()


def _tangents(frames: Frames, w: Tensor, cut: int, reproject: bool) -> tuple[Tensor, Tensor]:
    """The moves of both frames, each pair of singular vectors with the sign nearest to the base's left one."""
    u0, _, v0 = frames
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    sign = torch.where((u0 * u).sum(0) < 0, -1.0, 1.0).to(u)
    moves = []
    for frame, other in ((u0, u * sign), (v0, vh.mT * sign)):
        move = _project(frame, other - frame)
        move[:, cut:] = 0
        moves.append(_project(frame, move) if reproject else move)
    return moves[0], moves[1]


def _project(frame: Tensor, move: Tensor) -> Tensor:
    """Tangent part at a matrix with orthonormal columns: `Y - X sym(X^T Y)`."""
    inner = frame.mT @ move
    return move - frame @ ((inner + inner.mT) / 2)


def _first_order(frames: Frames, d: Tensor, cut: int) -> Tensor:
    """g of an update d to first order.

    `T = U0^T d V0` with zero diagonal, entries with one index past the cut halved and with both dropped; beyond the
    frames what d adds to the columns before the cut.
    """
    u0, s0, v0 = frames
    early = (torch.arange(len(s0), device=d.device) < cut).to(d)
    inner = u0.mT @ d @ v0
    within = inner * (early[:, None] + early) / 2
    within.fill_diagonal_(0)
    left, right = d @ v0 - u0 @ inner, u0.mT @ d - inner @ v0.mT
    return u0 @ within @ v0.mT + (left * early) @ v0.mT + (u0 * early) @ right
