"""Which entries an update changes in bfloat16, beside where the base is principal or small (arXiv 2511.08567).

In bfloat16 a small entry has finer steps, so noise too changes small entries more often: that these masks overlap is no
finding before the noise of the same norm is beside.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rotrl.linalg.spectrum import Basis


class Masks(NamedTuple):
    """Of the base, (..., m, n) booleans: the largest entries of its rank-k part, and its own smallest entries."""

    principal: Tensor
    low: Tensor


def masks(W0: Tensor, frame: Basis, share: float) -> Masks:
    """`share` is that of the singular directions in the rank-k part, and that of the entries in each mask."""
    k = max(1, round(share * frame.s.shape[-1]))
    part = (frame.U[..., :k] * frame.s[..., None, :k]) @ frame.V[..., :k].mT
    entries = W0.shape[-2] * W0.shape[-1]
    count = max(1, round(share * entries))
    principal, low = part.abs_().flatten(-2), W0.abs().flatten(-2).float()
    return Masks(
        (principal >= _ranked(principal, entries - count + 1)).view(W0.shape),
        (low <= _ranked(low, count)).view(W0.shape),
    )


def changed(W0: Tensor, W1: Tensor) -> Tensor:
    """The update mask: entries with other bits once both are cast to bfloat16."""
    before, after = (W.to(torch.bfloat16).view(torch.int16) for W in (W0, W1))
    return before != after


def density(mask: Tensor) -> Tensor:
    """Share of the entries of each matrix that are in the mask, float64."""
    return mask.sum((-2, -1)).double() / (mask.shape[-2] * mask.shape[-1])


def overlap(mask: Tensor, update: Tensor) -> Tensor:
    """|mask & update| / |mask| over the share of all entries in `update`: 1 for independent masks, NaN for none."""
    return density(mask & update) / density(mask) / density(update)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|a & b| / |a | b|; NaN for two empty masks."""
    return density(a & b) / density(a | b)


def jaccard_random(a: Tensor, b: Tensor) -> Tensor:
    """What two independent masks of these densities p and q show: p q / (p + q - p q)."""
    p, q = density(a), density(b)
    return p * q / (p + q - p * q)


def _ranked(values: Tensor, place: int) -> Tensor:
    return values.kthvalue(place, -1, keepdim=True).values
