"""Merges that are linear in the weights. `d_i = W_i - W0`, weights w_i default to 1."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rotrl.errors import ConfigError
from rotrl.merge.summary import Gram
from rotrl.merge.types import Pair, Rows


def linear(
    base: Rows, experts: Sequence[Tensor], *, weights: Sequence[float] | None = None, normalize: bool = True
) -> Tensor:
    """Weighted average `sum w_i W_i / sum w_i`, without the division if not `normalize`. arXiv 2203.05482.

    The mean is taken of the task vectors, which is the same number with fewer digits lost.
    """
    if not normalize:
        return weighted_sum(experts, weights)
    return base + weighted_sum([expert - base for expert in experts], shares(weights, len(experts)))


def task_arithmetic(
    base: Rows, experts: Sequence[Tensor], *, scale: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """`W0 + scale sum w_i d_i`. arXiv 2212.04089."""
    return base + scale * weighted_sum([expert - base for expert in experts], weights)


def extrapolation(
    base: Rows, experts: Sequence[Tensor], *, alpha: float = 0.1, weights: Sequence[float] | None = None
) -> Tensor:
    """ExPO: `W + alpha (W - W0)` beyond the expert W, or beyond the weighted mean of several. arXiv 2404.16792."""
    mean = linear(base, experts, weights=weights)
    return mean + alpha * (mean - base)


def interpolation(base: Rows, experts: Pair, *, t: float = 0.5) -> Tensor:
    """`W_1 + t (W_2 - W_1)`: the chord from the first expert to the second, which the geodesic bends."""
    first, second = experts
    return first + t * (second - first)


def model_stock(base: Rows, experts: Sequence[Tensor], *, summary: Gram | None = None) -> Tensor:
    """`W0 + t mean d_i` with `t = T cos / (1 + (T - 1) cos)`, cos the mean cosine of pairs of d_i. arXiv 2403.19522.

    One t for each tensor, -1 at least: cos = -1 / (T - 1), where the d_i cancel, is a pole. A single expert is kept as
    it is (t = 1).
    """
    count = len(experts)
    if count == 1:
        return experts[0].clone()
    summary = summary or Gram.of([(base, experts)], {})
    assert summary is not None
    return base.add(weighted_sum([expert - base for expert in experts]), alpha=_stock_ratio(summary) / count)


@lru_cache(maxsize=1)
def _stock_ratio(summary: Gram) -> float:
    inner = summary.inner[1:, 1:]
    count = len(inner)
    lengths = inner.diagonal().sqrt().clamp(min=torch.finfo(inner.dtype).tiny)
    unit = inner / lengths[:, None] / lengths
    cosine = float((unit.sum() - unit.trace()) / (count * (count - 1)))
    agreement = 1 + (count - 1) * cosine  # |sum of the unit vectors|^2 / T
    return max(-1.0, count * cosine / agreement) if agreement > 0 else -1.0


def linear_rule(hyper: Mapping[str, Any], *, pair: bool) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """The function, and its parameters, for the tensors that a method with these parameters does not act on.

    `t` goes from one expert to the other in a method of a `pair`; elsewhere it is another way.
    """
    if pair and "t" in hyper:
        return interpolation, {"t": hyper["t"]}
    rule, keys = (task_arithmetic, ("scale", "weights")) if "scale" in hyper else (linear, ("weights", "normalize"))
    return rule, {key: hyper[key] for key in keys if key in hyper}


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """`sum w_i x_i`, w_i = 1 by default."""
    w = weights or [1.0] * len(tensors)
    total = tensors[0] * w[0]
    for tensor, weight in zip(tensors[1:], w[1:], strict=True):
        total = total.add_(tensor, alpha=weight)
    return total


def shares(weights: Sequence[float] | None, count: int, *, positive: bool = False) -> list[float]:
    """Weights (1 by default) over their sum; ConfigError where that is 0, or not above 0 if it must be `positive`."""
    w = list(weights or [1.0] * count)
    total = sum(w)
    if (total if positive else abs(total)) <= 1e-12 * max(map(abs, w)):
        raise ConfigError(f"merge.weights sum to {total:g}, which can't be normalised; give others")
    return [x / total for x in w]
