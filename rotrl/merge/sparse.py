"""Merges that drop entries of the task vectors `d_i = W_i - W0` and settle conflicts of sign."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotrl.merge.linear import weighted_sum
from rotrl.merge.types import Density


def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.2,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Tensor:
    """TIES: trim, elect, merge. arXiv 2306.01708.

    Keeps the `density` n largest entries of |d_i| (per tensor; entries as large as the smallest kept one are kept
    too), elects the sign of `sum w_i d_i`, and gives `W0 + scale sum w_i d_i / sum w_i` over the entries of that sign;
    without the division if not `normalize`.
    """
    return base + scale * elect([trim(expert - base, density) for expert in experts], weights, normalize)


def dare_ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.5,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    rescale: bool = True,
    normalize: bool = False,
) -> Tensor:
    """DARE with sign election: drops entries with probability 1 - density, divides the rest by density if `rescale`.

    Then as TIES, summed over the entries of the elected sign as mergekit does, or averaged if `normalize`. The
    engine makes `seed` differ by tensor name, so that no mask depends on sharding. arXiv 2311.03099.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for expert in experts:
        mask = torch.rand(base.shape, generator=generator).to(base.device) < density
        kept.append((expert - base) * mask / (density if rescale else 1.0))
    return base + scale * elect(kept, weights, normalize)


def trim(d: Tensor, density: float) -> Tensor:
    """Zero but for the largest `round(density n)` entries by magnitude (at least one)."""
    n = d.numel()
    keep = max(1, round(density * n))
    if keep >= n:
        return d
    magnitude = d.abs()
    return d * (magnitude >= magnitude.flatten().kthvalue(n - keep + 1).values)


def elect(d: Sequence[Tensor], weights: Sequence[float] | None, normalize: bool) -> Tensor:
    """`sum w_i d_i` over the entries whose sign is that of the whole weighted sum, over `sum w_i` if `normalize`."""
    w = weights or [1.0] * len(d)
    sign = weighted_sum(d, w).sign()
    agreeing = [x * weight * sign > 0 for x, weight in zip(d, w, strict=True)]
    total = weighted_sum([x * mask for x, mask in zip(d, agreeing, strict=True)], w)
    if not normalize:
        return total
    count = weighted_sum([mask.to(total) for mask in agreeing], w)
    return total / torch.where(count == 0, 1, count)
