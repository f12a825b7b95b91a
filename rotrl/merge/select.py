"""Merges that choose, entry by entry, which task vectors `d_i = W_i - W0` count there."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from rotrl.merge.linear import weighted_sum
from rotrl.merge.sparse import elect
from rotrl.merge.statistics import Overlap
from rotrl.merge.summary import Bounds, Energies, Quartiles, importance, selected
from rotrl.merge.types import Count, Density, NonNegative, Rows, Within

Weights = Sequence[float] | None


def consensus(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    k: Count = 2,
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


def sce(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    select_topk: Density = 1.0,
    scale: float = 1.0,
    summary: Energies | None = None,
) -> Tensor:
    """Select, calculate, erase. arXiv 2408.07990.

    Keeps the entries of the `select_topk` largest variances between experts (counted among those that vary), weighs
    each tensor of an expert by its energy there, and averages the entries of the sign that `sum d_i` has.
    """
    summary = summary or Energies.of([(base, experts)], {"select_topk": select_topk})
    d = [expert - base for expert in experts]
    if select_topk < 1:
        mask = selected(base, experts, summary.least)
        d = [x * mask for x in d]
    sign = weighted_sum(d).sign_()
    return base.add(elect([x * (x * sign > 0) for x in d], summary.shares, normalize=True), alpha=scale)


def ram(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    threshold: NonNegative = 1e-5,
    relative: bool = False,
    scale: float = 1.0,
    summary: Bounds | None = None,
) -> Tensor:
    """Reinforced agent merging: what one expert alone changes is kept, what several change averaged. arXiv 2601.13572.

    An expert changes an entry where |d_i| > threshold, in units of the root mean square of d_i if `relative`: float32
    experts change every entry by more than 1e-5.
    """
    summary = summary or Bounds.of([(base, experts)], {"threshold": threshold, "relative": relative})
    return base + scale * _shared_mean(base, experts, summary, [1.0] * len(experts))


def ram_plus(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    statistics: Overlap,
    threshold: NonNegative = 1e-5,
    relative: bool = False,
    rescale: Annotated[float, Within(1)] = 1.2,
    scale: float = 1.0,
    summary: Bounds | None = None,
) -> Tensor:
    """RAM, the entries that an expert alone changes times `1 + (rescale - 1) min(1, shared_i / unique_i)`.

    The counts of its shared and unique entries are of the whole model, as in the authors' code. arXiv 2601.13572.
    """
    factors = [1 + (rescale - 1) * ratio for ratio in statistics.ratios()]
    summary = summary or Bounds.of([(base, experts)], {"threshold": threshold, "relative": relative})
    return base + scale * _shared_mean(base, experts, summary, factors)


def magmax(base: Rows, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """`W0 + scale d` with in every entry the d_i of largest magnitude, the mean of equally large. arXiv 2407.06322."""
    d = torch.stack([expert - base for expert in experts])
    chosen = d.abs() == d.abs().amax(0)
    return base + scale * (d * chosen).sum(0) / chosen.sum(0)


def arcee_fusion(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    weights: Weights = None,
    summary: Quartiles | None = None,
) -> Tensor:
    """`W0 + scale sum w_i m_i d_i`, m_i where the importance is at least median + 1.5 (q3 - q1). As in mergekit.

    Importance is |d_i| times KL(softmax W_i || softmax W0) of its row. Published for one expert, here summed.
    """
    summary = summary or Quartiles.of([(base, experts)], {})
    size = zip(importance(base, experts), summary.least, strict=True)
    kept = [(expert - base) * (x >= least) for expert, (x, least) in zip(experts, size, strict=True)]
    return base.add(weighted_sum(kept, weights), alpha=scale)


def _shared_mean(base: Tensor, experts: Sequence[Tensor], bounds: Bounds, factors: Sequence[float]) -> Tensor:
    """Mean of the active entries; where only one expert is active its entry times its factor."""
    d = [expert - base for expert in experts]
    masks = [x.abs() > above for x, above in zip(d, bounds.above, strict=True)]
    count = torch.stack(masks).sum(0)
    total = torch.zeros_like(base)
    for x, mask, factor in zip(d, masks, factors, strict=True):
        total += x * mask * torch.where(count == 1, factor, 1 / count.clamp(min=1))
    return total
