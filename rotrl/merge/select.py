"""Merges that choose, entry by entry, which task vectors `d_i = W_i - W0` count there."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from rotrl.merge.linear import weighted_sum
from rotrl.merge.sparse import elect, largest
from rotrl.merge.statistics import Overlap, active
from rotrl.merge.types import Density, NonNegative, Rows, Within

Weights = Sequence[float] | None


def consensus(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    k: Annotated[int, Within(1)] = 2,
    lam: NonNegative = 0.4,
    scale: float = 1.0,
    weights: Weights = None,
) -> Tensor:
    """Consensus of TALL masks: `W0 + scale m sum w_i d_i`. arXiv 2405.07813, equations 5 and 6.

    m keeps the entries that at least k experts hold important, `|d_i| > lam |sum_j d_j - d_i|`.
    """
    d = [expert - base for expert in experts]
    total = weighted_sum(d)
    votes = sum(((x.abs() > lam * (total - x).abs()).int() for x in d), start=torch.zeros_like(base, dtype=torch.int32))
    return base + scale * weighted_sum(d, weights) * (votes >= min(k, len(experts)))


def sce(base: Tensor, experts: Sequence[Tensor], *, select_topk: Density = 1.0, scale: float = 1.0) -> Tensor:
    """Select, calculate, erase. arXiv 2408.07990.

    Keeps the entries of the `select_topk` largest variances between experts (counted among those that vary), weighs
    each tensor of an expert by its energy there, and averages the entries of the sign that `sum d_i` has.
    """
    d = torch.stack([expert - base for expert in experts])
    if select_topk < 1:
        variance = d.var(0, unbiased=False)
        d = d * (largest(variance, round(select_topk * int(variance.count_nonzero()))) & (variance > 0))
    energy = d.double().flatten(1).square().sum(1)
    weights = (energy / energy.sum()).tolist() if energy.sum() > 0 else [1 / len(experts)] * len(experts)
    sign = d.sum(0).sign()
    return base + scale * elect(list(d * (d * sign > 0)), weights, normalize=True)


def ram(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    threshold: NonNegative = 1e-5,
    relative: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Reinforced agent merging: what one expert alone changes is kept, what several change averaged. arXiv 2601.13572.

    An expert changes an entry where |d_i| > threshold, in units of the root mean square of d_i if `relative`: float32
    experts change every entry by more than 1e-5.
    """
    return base + scale * _shared_mean(base, experts, threshold, relative, [1.0] * len(experts))


def ram_plus(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    statistics: Overlap,
    threshold: NonNegative = 1e-5,
    relative: bool = False,
    rescale: Annotated[float, Within(1)] = 1.2,
    scale: float = 1.0,
) -> Tensor:
    """RAM, the entries that an expert alone changes times `1 + (rescale - 1) min(1, shared_i / unique_i)`.

    The counts of its shared and unique entries are of the whole model, as in the authors' code. arXiv 2601.13572.
    """
    factors = [1 + (rescale - 1) * ratio for ratio in statistics.ratios()]
    return base + scale * _shared_mean(base, experts, threshold, relative, factors)


def magmax(base: Rows, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """`W0 + scale d` with in every entry the d_i of largest magnitude, the mean of equally large. arXiv 2407.06322."""
    d = torch.stack([expert - base for expert in experts])
    chosen = d.abs() == d.abs().amax(0)
    return base + scale * (d * chosen).sum(0) / chosen.sum(0)


def arcee_fusion(base: Tensor, experts: Sequence[Tensor], *, scale: float = 1.0, weights: Weights = None) -> Tensor:
    """`W0 + scale sum w_i m_i d_i`, m_i where the importance is at least median + 1.5 (q3 - q1). As in mergekit.

    Importance is |d_i| times KL(softmax W_i || softmax W0) of its row. Published for one expert, here summed.
    """
    return base + scale * weighted_sum([_important(base, expert) for expert in experts], weights)


def _shared_mean(
    base: Tensor, experts: Sequence[Tensor], threshold: float, relative: bool, factors: Sequence[float]
) -> Tensor:
    """Mean of the active entries; where only one expert is active its entry times its factor."""
    d = [expert - base for expert in experts]
    masks = [active(x, threshold, relative) for x in d]
    count = torch.stack(masks).sum(0)
    total = torch.zeros_like(base)
    for x, mask, factor in zip(d, masks, factors, strict=True):
        total += x * mask * torch.where(count == 1, factor, 1 / count.clamp(min=1))
    return total


def _important(base: Tensor, expert: Tensor) -> Tensor:
    d, floor = expert - base, 1e-8
    p, q = (torch.softmax(w.double(), -1) + floor for w in (expert, base))
    importance = d.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    flat = importance.flatten()
    q1, median, q3 = (flat.kthvalue(int(part * (flat.numel() - 1)) + 1).values for part in (0.25, 0.5, 0.75))
    return d * (importance >= median + 1.5 * (q3 - q1))
