"""Statistics of the whole model that a method needs before it merges the first tensor.

A method asks by a parameter `statistics` whose type is one of these classes. The engine then reads all tensors that the
method merges once, in name order, calls `add` for each, and gives the result to every call of the method. All are sums,
so neither sharding nor order changes them.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rotrl.merge.summary import Bounds, Pieces

DROPPED_BITS = 11  # of 31: 8 of the exponent and 12 of the mantissa stay
CHUNK = 1 << 22


class Statistics(Protocol):
    @classmethod
    def needed(cls, hyper: Mapping[str, Any]) -> Self | None:
        """An empty one for a method with these parameters, None if they make do without."""
        ...

    def add(self, pieces: Pieces) -> None: ...


class Magnitudes:
    """Histograms of log |d_i| over the whole model: bins 2^-12 wide in the logarithm, 8 MB an expert."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []

    @classmethod
    def needed(cls, hyper: Mapping[str, Any]) -> Self | None:
        return cls() if hyper.get("threshold") == "model" else None

    def add(self, pieces: Pieces) -> None:
        for base, experts in pieces:
            self.counts = self.counts or [torch.zeros(1 << (31 - DROPPED_BITS), dtype=torch.int64) for _ in experts]
            for count, expert in zip(self.counts, experts, strict=True):
                for part in (expert - base).float().abs().flatten().split(CHUNK):
                    # The bits of a positive float are ordered as the float is: their head is a bin of its logarithm.
                    bins = part.cpu().view(torch.int32) >> DROPPED_BITS
                    count += torch.bincount(bins, minlength=len(count))

    def thresholds(self, density: float) -> list[float]:
        """For each expert the magnitude that `density` of all its entries reach, rounded down to its bin (2^-12)."""
        return [_threshold(count, density) for count in self.counts]


def _threshold(count: Tensor, density: float) -> float:
    keep = max(1, round(density * int(count.sum())))
    reaching = count.flip(0).cumsum(0)
    lowest = len(count) - 1 - int((reaching < keep).sum())
    return torch.tensor(lowest << DROPPED_BITS, dtype=torch.int32).view(torch.float32).item()


class Overlap:
    """For each expert how many entries it alone changes and how many it shares, over the whole model."""

    def __init__(self, threshold: float, relative: bool) -> None:
        self.threshold, self.relative = threshold, relative
        self.unique: list[int] = []
        self.shared: list[int] = []

    @classmethod
    def needed(cls, hyper: Mapping[str, Any]) -> Self | None:
        return cls(hyper["threshold"], hyper["relative"])

    def add(self, pieces: Pieces) -> None:
        above = Bounds.of(pieces, {"threshold": self.threshold, "relative": self.relative}).above
        for base, experts in pieces:
            masks = [(expert - base).abs() > bound for expert, bound in zip(experts, above, strict=True)]
            alone = sum(mask.int() for mask in masks) == 1
            self.unique = self.unique or [0] * len(experts)
            self.shared = self.shared or [0] * len(experts)
            for i, mask in enumerate(masks):
                self.unique[i] += int((mask & alone).sum())
                self.shared[i] += int((mask & ~alone).sum())

    def ratios(self) -> list[float]:
        """min(1, shared / unique) of each expert; 1 where all it changes is shared, 0 where it changes nothing."""
        return [
            min(1.0, shared / unique) if unique else float(shared > 0)
            for shared, unique in zip(self.shared, self.unique, strict=True)
        ]
