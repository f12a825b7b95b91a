"""Merges that drop entries of the task vectors `d_i = W_i - W0` and settle conflicts of sign.

Where entries are dropped at random, the engine makes `seed` differ by tensor name: no mask depends on sharding.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rotrl.errors import ConfigError
from rotrl.merge.linear import weighted_sum
from rotrl.merge.statistics import Magnitudes
from rotrl.merge.summary import Thresholds
from rotrl.merge.types import Density, Rows, Share

Weights = Sequence[float] | None


def ties(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.2,
    scale: float = 1.0,
    weights: Weights = None,
    normalize: bool = True,
    threshold: Literal["tensor", "model"] = "tensor",
    statistics: Magnitudes | None = None,
    summary: Thresholds | None = None,
) -> Tensor:
    """TIES: trim, elect, merge. arXiv 2306.01708.

    Keeps the `density` n largest entries of |d_i| (entries as large as the smallest kept one are kept too), counted in
    each tensor or, as the authors' code does, with one threshold for the whole model. Elects the sign of
    `sum w_i d_i`, and gives `W0 + scale sum w_i d_i / sum w_i` over the entries of that sign; without the division if
    not `normalize`.
    """
    if threshold == "model" and statistics is not None:
        least = statistics.thresholds(density)
    else:
        summary = summary or Thresholds.of([(base, experts)], {"density": density})
        assert summary is not None
        least = summary.least
    kept = [shrink(expert - base, bound) for expert, bound in zip(experts, least, strict=True)]
    return base.add(elect(kept, weights, normalize), alpha=scale)


def dare_linear(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.5,
    scale: float = 1.0,
    weights: Weights = None,
    seed: int = 0,
    rescale: bool = True,
) -> Tensor:
    """DARE: `W0 + scale sum w_i m_i d_i / density`, m_i = 1 with probability density, else 0. arXiv 2311.03099."""
    return base + scale * weighted_sum(_dropped(base, experts, density, seed, rescale), weights)


def dare_ties(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.5,
    scale: float = 1.0,
    weights: Weights = None,
    seed: int = 0,
    rescale: bool = True,
    normalize: bool = False,
) -> Tensor:
    """DARE with sign election: drops entries with probability 1 - density, divides the rest by density if `rescale`.

    Then as TIES, summed over the entries of the elected sign as mergekit does, or averaged if `normalize`.
    arXiv 2311.03099.
    """
    return base.add(elect(_dropped(base, experts, density, seed, rescale), weights, normalize), alpha=scale)


def della_linear(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.5,
    epsilon: Share = 0.15,
    scale: float = 1.0,
    weights: Weights = None,
    seed: int = 0,
    rescale: bool = True,
) -> Tensor:
    """DELLA without sign election: `W0 + scale sum w_i m_i d_i / p_i`, m_i = 1 with probability p_i. arXiv 2406.11617.

    In each row p rises with the rank of |d_i| from density - epsilon to density + epsilon.
    """
    return base + scale * weighted_sum(_dropped_by_rank(base, experts, density, epsilon, seed, rescale), weights)


def della(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.5,
    epsilon: Share = 0.15,
    scale: float = 1.0,
    weights: Weights = None,
    seed: int = 0,
    rescale: bool = True,
    normalize: bool = True,
) -> Tensor:
    """DELLA: drops as `della_linear`, elects signs as TIES and averages the entries of that sign. arXiv 2406.11617."""
    kept = _dropped_by_rank(base, experts, density, epsilon, seed, rescale)
    return base.add(elect(kept, weights, normalize), alpha=scale)


def breadcrumbs(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.9,
    gamma: Share = 0.01,
    scale: float = 1.0,
    weights: Weights = None,
    summary: Thresholds | None = None,
) -> Tensor:
    """Model Breadcrumbs: `W0 + scale sum w_i m_i d_i`, in each tensor without outliers and tail. arXiv 2312.06795.

    m_i drops the `gamma` n largest entries of |d_i| and the smallest, so that `density` n remain.
    """
    return base.add(weighted_sum(_crumbs(base, experts, density, gamma, summary), weights), alpha=scale)


def breadcrumbs_ties(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.9,
    gamma: Share = 0.01,
    scale: float = 1.0,
    weights: Weights = None,
    normalize: bool = False,
    summary: Thresholds | None = None,
) -> Tensor:
    """Model Breadcrumbs with the sign election of TIES, summed as mergekit does, or averaged if `normalize`."""
    return base.add(elect(_crumbs(base, experts, density, gamma, summary), weights, normalize), alpha=scale)


def trim(d: Tensor, density: float) -> Tensor:
    """Zero but for the largest `round(density n)` entries by magnitude (at least one)."""
    return d * largest(d.abs(), max(1, round(density * d.numel())))


def shrink(d: Tensor, least: float) -> Tensor:
    """Zero where |d| < least."""
    below = torch.nextafter(torch.tensor(least, dtype=d.dtype), torch.zeros((), dtype=d.dtype)).item()
    return torch.nn.functional.hardshrink(d, below)


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest values and of all that equal the smallest of them."""
    if count >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    return values >= values.flatten().kthvalue(values.numel() - count + 1).values


def elect(d: Sequence[Tensor], weights: Weights, normalize: bool) -> Tensor:
    """`sum w_i d_i` over the entries whose sign is that of the whole weighted sum, over `sum w_i` if `normalize`."""
    w = weights or [1.0] * len(d)
    sign = weighted_sum(d, w).sign_()
    agreeing = [(x * sign).mul_(weight).clamp_(min=0) for x, weight in zip(d, w, strict=True)]
    total = weighted_sum(agreeing).mul_(sign)
    if not normalize:
        return total
    count = weighted_sum([x.sign_() for x in agreeing], w)
    if min(w) > 0:
        return total.div_(count.clamp_(min=min(w)))
    return total / torch.where(count == 0, 1, count)


def keep_probability(d: Tensor, density: float, epsilon: float) -> Tensor:
    """In each row from density - epsilon for the smallest |d| to density + epsilon for the largest, linear in rank."""
    if density == 1:
        return torch.ones_like(d)
    if not (density > epsilon and density + epsilon <= 1):
        raise ConfigError(
            f"merge.density={density} and merge.epsilon={epsilon}: density -+ epsilon must lie in (0, 1]; "
            "use a smaller epsilon"
        )
    return density + epsilon * (2 * _rank(d.abs()).to(d) / max(1, d.shape[-1] - 1) - 1)


def _rank(magnitude: Tensor) -> Tensor:
    """The rank of each entry in its row, of equal entries the first being the lower."""
    columns = torch.arange(magnitude.shape[-1], device=magnitude.device)
    if magnitude.dtype == torch.float32 and magnitude.device.type == "cpu":
        # Bits of positive floats are ordered as the floats: with the column below them one sort of integers by numpy,
        # which uses vector instructions, takes a tenth of an argsort.
        width = magnitude.shape[-1].bit_length()
        keys = (magnitude.view(torch.int32).long() << width) | columns
        order = torch.from_numpy(np.sort(keys.numpy())) & ((1 << width) - 1)
    else:
        order = magnitude.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(-1, order, columns.expand_as(order))


def _dropped(base: Tensor, experts: Sequence[Tensor], density: float, seed: int, rescale: bool) -> list[Tensor]:
    return _sample(base, experts, [density] * len(experts), seed, rescale)


def _dropped_by_rank(
    base: Tensor, experts: Sequence[Tensor], density: float, epsilon: float, seed: int, rescale: bool
) -> list[Tensor]:
    probability = [keep_probability(expert - base, density, epsilon) for expert in experts]
    return _sample(base, experts, probability, seed, rescale)


def _sample(
    base: Tensor, experts: Sequence[Tensor], probability: Sequence[Tensor] | Sequence[float], seed: int, rescale: bool
) -> list[Tensor]:
    """Task vectors of which each entry stays with its probability, divided by it if `rescale`."""
    generator = np.random.SFC64(seed)  # a third of the time of torch.rand
    kept = []
    for expert, p in zip(experts, probability, strict=True):
        bits = generator.random_raw(-(-base.numel() // 2)).view(np.int32)[: base.numel()]
        draw = torch.from_numpy(bits).to(base).view(base.shape)  # from -2^31 to 2^31
        stays = draw.le_((p - 0.5) * 2.0**32)
        kept.append((expert - base).mul_(stays.div_(p) if rescale else stays))
    return kept


def _crumbs(
    base: Tensor, experts: Sequence[Tensor], density: float, gamma: float, summary: Thresholds | None
) -> list[Tensor]:
    summary = summary or Thresholds.of([(base, experts)], {"density": density, "gamma": gamma})
    assert summary is not None
    kept = [shrink(expert - base, bound) for expert, bound in zip(experts, summary.least, strict=True)]
    return [d.masked_fill_(d.abs() > most, 0.0) for d, most in zip(kept, summary.most, strict=True)]
