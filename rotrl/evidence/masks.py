"""Which entries an update changes in bfloat16, beside where the base is principal or small (arXiv 2511.08567).

In bfloat16 a small entry has finer steps, so noise too changes small entries more often: that these masks overlap is no
finding before the noise of the same norm is beside.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rotrl.linalg.spectrum import Basis


class Masks(NamedTuple):
    """Of the base, (m, n) booleans: the largest entries of its rank-k part, and its own smallest entries."""

    principal: Tensor
    low: Tensor


def masks(W0: Tensor, frame: Basis, share: float) -> Masks:
    """`share` is that of the singular directions in the rank-k part, and that of the entries in each mask."""
    k = max(1, round(share * len(frame.s)))
    part = ((frame.U[:, :k] * frame.s[:k]) @ frame.V[:, :k].mT).abs().flatten()
    size, count = W0.numel(), max(1, round(share * W0.numel()))
    low = W0.abs().flatten().float()
    return Masks(
        (part >= part.kthvalue(size - count + 1).values).view_as(W0),
        (low <= low.kthvalue(count).values).view_as(W0),
    )


def changed(W0: Tensor, W1: Tensor) -> Tensor:
    """The update mask: entries with other bits once both are cast to bfloat16."""
    before, after = (W.to(torch.bfloat16).view(torch.int16) for W in (W0, W1))
    return before != after


def overlap(mask: Tensor, update: Tensor) -> float:
    """|mask & update| / |mask| over the share of all entries in `update`: 1 for independent masks, NaN for none."""
    density = float(update.double().mean())
    return float((mask & update).sum() / mask.sum()) / density if density else float("nan")


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a & b| / |a | b|; NaN for two empty masks."""
    union = float((a | b).sum())
    return float((a & b).sum()) / union if union else float("nan")


def jaccard_random(a: Tensor, b: Tensor) -> float:
    """What two independent masks of these densities p and q show: p q / (p + q - p q)."""
    p, q = (float(mask.double().mean()) for mask in (a, b))
    return p * q / (p + q - p * q) if p + q else float("nan")
