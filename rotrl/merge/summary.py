"""What a method that merges by rows must know of the whole tensor.

Such a method has a parameter `summary` of one of these classes. The engine, which hands it rows, makes the summary from
all pieces of the tensor before; a function called with a whole tensor makes its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from rotrl.merge.chunks import ENTRIES

Pieces = Sequence[tuple[Tensor, Sequence[Tensor]]]
SAMPLED, STRIDE = 1 << 20, 61  # entries of a tensor from which on a sample is every 61st: prime, so of all columns
SIGMAS = 6.0


class Summary(Protocol):
    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> Self | None:
        """From all pieces, which can be gone through repeatedly; None where the parameters make do without."""
        ...


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products of W0, d_1, ..., d_T in float64: (T + 1, T + 1), or (columns, T + 1, T + 1) with axis=column.

    Lengths and angles follow from it without loss, since the small d_i are taken apart from the large W0. Hashed by
    identity: what follows is worked out once for all pieces of a tensor.
    """

    inner: Tensor

    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> "Gram | None":
        axis = hyper.get("axis", "tensor")
        if axis == "row":
            return None
        total = sum(inner_products([base, *(e - base for e in experts)], axis) for base, experts in pieces)
        assert isinstance(total, Tensor)
        return cls(total)


def inner_products(tensors: Sequence[Tensor], axis: str = "tensor") -> Tensor:
    """All inner products in float64, of whole tensors or of the rows or columns of matrices (..., T, T).

    Of whole tensors float64 adds up what float32 gives for each ENTRIES values, which is right to 1e-7 of |a| |b|.
    """
    count = range(len(tensors))
    if axis == "tensor" or tensors[0].ndim != 2:
        split = [tensor.flatten().split(ENTRIES) for tensor in tensors]
        rows = [[sum(map(_dot, a, b)) for b in split[: i + 1]] for i, a in enumerate(split)]
        full = [[rows[max(i, j)][min(i, j)] for j in count] for i in count]
        return torch.tensor(full, dtype=torch.float64, device=tensors[0].device)
    x, along = [tensor.double() for tensor in tensors], 1 if axis == "row" else 0
    rows = [[(a * b).sum(along) for b in x[: i + 1]] for i, a in enumerate(x)]
    return torch.stack([torch.stack([rows[max(i, j)][min(i, j)] for j in count], -1) for i in count], -2)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


@dataclass(frozen=True)
class Thresholds:
    """For each expert between which magnitudes entries of d_i are kept: `least <= |d_i| <= most`.

    The `density` n largest are kept, and what equals the smallest of them; with `gamma` they come after the gamma n
    largest, which go.
    """

    least: list[float]
    most: list[float]

    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> "Thresholds | None":
        if hyper.get("threshold") == "model":
            return None
        density, gamma = hyper["density"], hyper.get("gamma", 0.0)

        def ranks(total: int) -> list[int]:
            keep = max(1, round(density * total))
            top = min(round(gamma * total), total - keep)
            return [top + keep, top + 1]

        found = kth_largest(pieces, lambda base, experts: [(e - base).abs_() for e in experts], ranks)
        return cls([least for least, _ in found], [most if gamma else math.inf for _, most in found])


@dataclass(frozen=True)
class Bounds:
    """For each expert what |d_i| must exceed to count: `threshold`, in root mean squares of d_i if `relative`."""

    above: list[float]

    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> "Bounds":
        squares, total = [0.0] * len(pieces[0][1]), 0
        for base, experts in pieces if hyper["relative"] else ():
            for i, expert in enumerate(experts):
                d = (expert - base).double().flatten()
                squares[i] += float(torch.dot(d, d))
            total += base.numel()
        return cls([hyper["threshold"] * ((square / total) ** 0.5 if total else 1.0) for square in squares])


@dataclass(frozen=True)
class Energies:
    """The variance that the `select_topk` largest reach, and each expert's share of the energy where it is reached."""

    least: float
    shares: list[float]

    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> "Energies":
        least, topk, count = 0.0, hyper["select_topk"], len(pieces[0][1])
        if topk < 1:
            varying = sum(int(variance(base, experts).count_nonzero()) for base, experts in pieces)
            wanted = max(1, round(topk * varying))
            [[least]] = kth_largest(pieces, lambda base, experts: [variance(base, experts)], lambda _: [wanted])
        energy = [0.0] * count
        for base, experts in pieces:
            mask = selected(base, experts, least) if topk < 1 else None
            for i, expert in enumerate(experts):
                d = (expert - base).double() if mask is None else (expert - base).double() * mask
                energy[i] += float(d.square().sum())
        total = sum(energy)
        return cls(least, [e / total for e in energy] if total else [1 / count] * count)


@dataclass(frozen=True)
class Quartiles:
    """For each expert the importance that counts: the median of all entries and 1.5 times the third less the first."""

    least: list[float]

    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> "Quartiles":
        def ranks(total: int) -> list[int]:
            return [total - int(part * (total - 1)) for part in (0.25, 0.5, 0.75)]

        found = kth_largest(pieces, importance, ranks, by_entry=False)
        return cls([median + 1.5 * (upper - lower) for lower, median, upper in found])


def importance(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """|d_i| times KL(softmax W_i || softmax W0) of its row, of each expert."""
    floor = 1e-8
    q = torch.softmax(base.double(), -1) + floor
    found = []
    for expert in experts:
        p = torch.softmax(expert.double(), -1) + floor
        found.append((expert - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True))
    return found


def variance(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return torch.stack([expert - base for expert in experts]).var(0, unbiased=False)


def selected(base: Tensor, experts: Sequence[Tensor], least: float) -> Tensor:
    """Mask of the entries that vary between experts, by `least` or more."""
    found = variance(base, experts)
    return (found >= least) & (found > 0)


def kth_largest(
    pieces: Pieces,
    values: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]],
    ranks: Callable[[int], Sequence[int]],
    *,
    by_entry: bool = True,
) -> list[list[float]]:
    """Exactly the values at some ranks (1 the largest) among all that `values` gives of each piece, of each kind.

    `ranks` has the number of entries. A sample tells between which two values each lies; one pass counts what is above
    these and keeps what is between: neither sorting nor memory for a whole tensor. What the sample tells may be wrong,
    then the two values are taken farther apart. `by_entry`: an entry's value depends on that entry alone.
    """
    step = STRIDE if len(pieces) * pieces[0][0].numel() > SAMPLED else 1
    samples: list[list[np.ndarray]] = []
    total = 0
    for base, experts in pieces:
        total += base.numel()
        if by_entry:
            base, experts = base.flatten()[::step], [expert.flatten()[::step] for expert in experts]
        # A copy, or it would hold the whole tensor.
        found = [_flat(x)[:: 1 if by_entry else step].copy() for x in values(base, experts)]
        samples = [[*old, x] for old, x in zip(samples or [[]] * len(found), found, strict=True)]
    wanted, sorted_ = ranks(total), [np.sort(np.concatenate(parts)) for parts in samples]
    found, width = {}, SIGMAS if step > 1 else 0.0
    while len(found) < len(sorted_) * len(wanted):
        searches = {
            (i, k): _Search(rank, *_bracket(x, rank / max(1, total), width))
            for i, x in enumerate(sorted_)
            for k, rank in enumerate(wanted)
            if (i, k) not in found
        }
        for base, experts in pieces:
            given = [_flat(x) for x in values(base, experts)]
            for (i, _), search in searches.items():
                search.add(given[i])
        found |= {place: value for place, search in searches.items() if (value := search.value()) is not None}
        width = 8 * width + 1
    return [[found[i, k] for k in range(len(wanted))] for i in range(len(sorted_))]


def _bracket(sample: np.ndarray, share: float, width: float) -> tuple[float, float]:
    """The sample's values `width` standard deviations below and above the one that `share` of all reach."""
    size = len(sample)
    place, margin = size - share * size, width * math.sqrt(max(1.0, share * (1 - share) * size)) if width else 0.0
    low, high = math.floor(place - margin), math.ceil(place + margin)
    return float(sample[low]) if 0 <= low < size else -1.0, float(sample[high]) if high < size else math.inf


class _Search:
    """The value at a rank, sought between two values; what equals these is counted, however much it is."""

    def __init__(self, rank: int, low: float, high: float) -> None:
        self.rank, self.low, self.high = rank, low, high
        self.above = self.from_high = self.from_low = 0
        self.between: list[tuple[np.ndarray, np.ndarray]] = []  # values and how often: stored in 16 bits many are equal

    def add(self, x: np.ndarray) -> None:
        self.above += np.count_nonzero(x > self.high)
        self.from_high += np.count_nonzero(x >= self.high)
        self.from_low += np.count_nonzero(x >= self.low)
        self.between.append(np.unique(x[(x > self.low) & (x < self.high)], return_counts=True))

    def value(self) -> float | None:
        """None where it is not between them."""
        between, counts = (np.concatenate(parts) for parts in zip(*self.between, strict=True))
        order = between.argsort()[::-1]
        reached = counts[order].cumsum()
        inside = int(counts.sum())
        if (self.low, self.high) == (-1.0, math.inf):  # NaN is of no rank
            if not self.from_low:
                return math.nan
            self.rank = min(self.rank, self.from_low)
        if self.above < self.rank <= self.from_high:
            return self.high
        if self.from_high < self.rank <= self.from_high + inside:
            return float(between[order[reached.searchsorted(self.rank - self.from_high)]])
        return self.low if self.from_high + inside < self.rank <= self.from_low else None


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().flatten().cpu().numpy()
