"""The common scale of task-vector methods: lambda as a number, or a rule that finds one for every tensor."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from rotrl.errors import ConfigError, NumericsError

Merged = tuple[Tensor, Sequence[Tensor], Tensor]
RULES = ("mean", "norm", "sum", "retention")


def at_scale(
    merge: Callable[[dict[str, Any]], Iterable[Merged]], count: int, hyper: dict[str, Any]
) -> Iterator[Merged]:
    """Base, experts and merge of each piece of a tensor, at a number or by a rule; `d` is the update at scale 1.

    `merge(hyper)` gives base, `count` experts and merge of each piece. mean: scale 1 / sum w_i (1/T without weights).
    sum: scale 1. norm: `W0 + lambda d` with |lambda d| = mean |d_i|. retention: `W0 + lambda d` with
    `lambda = sum |d_i|^2 / sum <d, d_i>`, so that the merge has as much of the task vectors along themselves as they
    have; for `d = sum d_i` of equal norms it solves `sum_j c <d_j, d_i> = |d_i|^2`.
    """
    rule = hyper.get("scale")
    if rule == "mean":
        total = sum(hyper.get("weights") or [1.0] * count)
        if not total:
            raise ConfigError("merge.weights sum to 0, by which merge.scale=mean divides; give others or a number")
        hyper = hyper | {"scale": 1 / total}
    elif isinstance(rule, str):
        hyper = hyper | {"scale": 1.0}
    if rule not in ("norm", "retention"):
        yield from merge(hyper)
        return
    pieces, last, energy, products, squares = 0, None, 0.0, 0.0, [0.0] * count
    for pieces, last in enumerate(merge(hyper), 1):  # noqa: B007
        base, experts, merged = last
        d = (merged - base).double()
        vectors = [(expert - base).double() for expert in experts]
        energy += float(d.square().sum())
        products += float(sum((d * v).sum() for v in vectors))
        squares = [square + float(v.square().sum()) for square, v in zip(squares, vectors, strict=True)]
    wanted, found = (sum(squares), products) if rule == "retention" else (_mean_root(squares), energy**0.5)
    if wanted and found <= 1e-6 * wanted:
        raise NumericsError(f"the update at scale 1 is nothing that merge.scale={rule} could enlarge; use a number")
    factor = wanted / found if wanted else 1.0
    # A tensor in one piece is not merged twice: it may take minutes.
    for base, experts, merged in [last] if pieces == 1 and last else merge(hyper):
        yield base, experts, (base + factor * (merged - base).double()).to(base)


def _mean_root(squares: Sequence[float]) -> float:
    return sum(square**0.5 for square in squares) / len(squares)
