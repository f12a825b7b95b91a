"""The common scale of task-vector methods: lambda as a number, or a rule that finds one for every tensor."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rotrl.errors import ConfigError, NumericsError

RULES = ("mean", "norm", "sum", "retention")


def at_scale(function: Callable[..., Tensor], base: Tensor, experts: Sequence[Tensor], hyper: dict[str, Any]) -> Tensor:
    """`function(base, experts, **hyper)` where `hyper["scale"]` may be a rule, with `d` the update at scale 1.

    mean: scale 1 / sum w_i (1/T without weights). sum: scale 1. norm: `W0 + lambda d` with |lambda d| = mean |d_i|.
    retention: `W0 + lambda d` with `lambda = sum |d_i|^2 / sum <d, d_i>`, so that the merge has as much of the task
    vectors along themselves as they have; for `d = sum d_i` of equal norms it solves `sum_j c <d_j, d_i> = |d_i|^2`.
    """
    rule = hyper.get("scale")
    if not isinstance(rule, str):
        return function(base, experts, **hyper)
    if rule == "mean":
        total = sum(hyper.get("weights") or [1.0] * len(experts))
        if not total:
            raise ConfigError("merge.weights sum to 0, by which merge.scale=mean divides; give others or a number")
        return function(base, experts, **hyper | {"scale": 1 / total})
    merged = function(base, experts, **hyper | {"scale": 1.0})
    if rule == "sum":
        return merged
    d = (merged - base).double()
    vectors = [(expert - base).double() for expert in experts]
    if rule == "norm":
        wanted, found = float(sum(v.norm() for v in vectors)) / len(vectors), float(d.norm())
    else:
        wanted, found = float(sum(v.square().sum() for v in vectors)), float(sum((d * v).sum() for v in vectors))
    if not wanted:
        return merged
    if found <= 1e-6 * wanted:
        raise NumericsError(f"the update at scale 1 is nothing that merge.scale={rule} could enlarge; use a number")
    return (base + (wanted / found) * d).to(base)
