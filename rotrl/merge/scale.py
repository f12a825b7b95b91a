"""The common scale of task-vector methods: lambda as a number, or a rule that finds one by tensor or for all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

from torch import Tensor

from rotrl.errors import ConfigError, NumericsError
from rotrl.values import Rule

Merged = tuple[Tensor, Sequence[Tensor], Tensor]
GLOBAL = ("norm_global", "retention_global")
RULES = get_args(Rule)


class Sums:
    """Norms and inner products of the update `d = W - W0` at scale 1 and the task vectors d_i, over pieces."""

    def __init__(self, count: int) -> None:
        self.energy, self.products, self.squares = 0.0, 0.0, [0.0] * count

    def add(self, base: Tensor, experts: Sequence[Tensor], merged: Tensor) -> None:
        d = (merged - base).double()
        self.energy += float(d.square().sum())
        for i, expert in enumerate(experts):
            vector = (expert - base).double()
            self.products += float((d * vector).sum())
            self.squares[i] += float(vector.square().sum())

    def factor(self, rule: str) -> float:
        """lambda of `W0 + lambda d`: norm has `|lambda d| = mean |d_i|`, retention `<lambda d, sum d_i> = sum |d_i|^2`.

        By retention the merge has as much of the task vectors along themselves as they have; for `d = sum d_i` of equal
        norms it solves `sum_j c <d_j, d_i> = |d_i|^2`. NumericsError where d is nothing to enlarge.
        """
        wanted, found = sum(self.squares), self.products
        if rule.startswith("norm"):
            wanted, found = sum(square**0.5 for square in self.squares) / len(self.squares), self.energy**0.5
        if wanted and found <= 1e-6 * wanted:
            raise NumericsError(f"the update at scale 1 is nothing that merge.scale={rule} could enlarge; use a number")
        return wanted / found if wanted else 1.0


def mean_as_number(hyper: dict[str, Any], count: int) -> dict[str, Any]:
    """The parameters with the rule `mean` as what it stands for, 1 / sum w_i."""
    if hyper.get("scale") != "mean":
        return hyper
    total = sum(hyper.get("weights") or [1.0] * count)
    if not total:
        raise ConfigError("merge.weights sum to 0, by which merge.scale=mean divides; give others or a number")
    return hyper | {"scale": 1 / total}


def at_scale(
    merge: Callable[[dict[str, Any]], Iterable[Merged]], count: int, hyper: dict[str, Any], factor: float | None = None
) -> Iterator[Merged]:
    """Base, experts and merge of each piece of a tensor, at a number or by a rule.

    `merge(hyper)` gives base, `count` experts and merge of each piece. mean: scale 1 / sum w_i (1/T without weights).
    sum: scale 1. norm and retention: `W0 + lambda d` with lambda by `Sums` of the tensor, norm_global and
    retention_global: with the `factor` that is given, by those of the whole model.
    """
    hyper = mean_as_number(hyper, count)
    rule = hyper.get("scale")
    if isinstance(rule, str):
        hyper = hyper | {"scale": 1.0}
    if rule not in ("norm", "retention", *GLOBAL):
        yield from merge(hyper)
        return
    pieces, last, sums = 0, None, Sums(count)
    if factor is None:
        for pieces, last in enumerate(merge(hyper), 1):  # noqa: B007
            sums.add(*last)
        factor = sums.factor(rule)
    # A tensor in one piece is not merged twice: it may take minutes.
    for base, experts, merged in [last] if pieces == 1 and last else merge(hyper):
        yield base, experts, (base + factor * (merged - base).double()).to(base)
