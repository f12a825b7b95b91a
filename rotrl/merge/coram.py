"""CORAM: slices of rows averaged by their singular frames and values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rotrl.linalg.procrustes import polar, singular
from rotrl.linalg.rotation import exp, log
from rotrl.merge.types import Count, NonNegative, Slices


def coram(
    base: Slices,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    height: Count = 16,
    kappa: NonNegative = 1.15,
) -> Tensor:
    """`W0 + scale kappa sqrt(T) (W_m - W0)`, W_m a mean of the experts by slices of `height` rows. arXiv 2608.17366.

    With the slices `W0 = U0 S0 V0^T` and `W_i = U_i S_i V_i^T`: `Q_i = polar(U0^T U_i)`,
    `U = U0 exp(mean log Q_i)`, `S = S0 (I + mean(S_i S0^-1 - I))`, `V = polar(mean V_i)`. To first order task
    arithmetic at kappa / sqrt(T). Signs of singular pairs are those nearest to the base's. In float64.
    """
    m, n = base.shape
    height = min(height, m, n)
    whole = m - m % height
    merged = [_mean(*(w[:whole].double().unflatten(0, (-1, height)) for w in (base, *experts))).flatten(0, 1)]
    if whole < m:
        merged.append(_mean(*(w[whole:].double() for w in (base, *experts))))
    mean = torch.cat(merged)
    return (base + scale * kappa * math.sqrt(len(experts)) * (mean - base)).to(base)


def _mean(base: Tensor, *experts: Tensor) -> Tensor:
    """Mean of slices (..., h, n), h <= n."""
    u0, s0, _ = singular(base)
    rotations, stretches, frames = [], [], []
    for expert in experts:
        u, s, vh = singular(expert)
        sign = _signs(u0, u)
        rotations.append(log(polar(u0.mT @ (u * sign))))
        stretches.append(torch.where(s0 > 0, s / s0 - 1, 0.0))
        frames.append(vh.mT * sign)
    u = u0 @ exp(torch.stack(rotations).mean(0))
    s = s0 * (1 + torch.stack(stretches).mean(0))
    return (u * s[..., None, :]) @ polar(torch.stack(frames).mean(0)).mT


def _signs(u0: Tensor, u: Tensor) -> Tensor:
    """Signs of the columns of u, (..., 1, h), nearest to those of u0 among those that leave a rotation between them."""
    overlap = (u0 * u).sum(-2)
    sign = torch.where(overlap < 0, -1.0, 1.0).to(u)
    reflected = torch.linalg.slogdet(u0.mT @ (u * sign[..., None, :])).sign < 0
    weakest = torch.nn.functional.one_hot(overlap.abs().argmin(-1), u.shape[-1])
    return torch.where(reflected[..., None] & (weakest > 0), -sign, sign)[..., None, :]
