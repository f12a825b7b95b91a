"""What a method that merges by rows must know of the whole tensor.

Such a method has a parameter `summary` of one of these classes. The engine, which hands it rows, makes the summary from
all pieces of the tensor before; a function called with a whole tensor makes its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

Pieces = Iterable[tuple[Tensor, Sequence[Tensor]]]
DIGIT = 16


class Summary(Protocol):
    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> Self | None:
        """From all pieces, which can be gone through repeatedly; None where the parameters make do without."""
        ...


@dataclass(frozen=True)
class Gram:
    """Inner products of W0, d_1, ..., d_T in float64: (T + 1, T + 1), or (columns, T + 1, T + 1) with axis=column.

    Lengths and angles follow from it without loss, since the small d_i are taken apart from the large W0.
    """

    inner: Tensor

    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> "Gram | None":
        axis = hyper.get("axis", "tensor")
        if axis == "row":
            return None
        parts = [inner_products([base, *(e - base for e in experts)], axis) for base, experts in pieces]
        return cls(torch.stack(parts).sum(0))


def inner_products(tensors: Sequence[Tensor], axis: str = "tensor") -> Tensor:
    """All inner products in float64, of whole tensors or of the rows or columns of matrices (..., T, T)."""
    x = [tensor.double() for tensor in tensors]
    if axis == "tensor" or x[0].ndim != 2:
        flat = [tensor.flatten() for tensor in x]
        rows = [[torch.dot(a, b) for b in flat[: i + 1]] for i, a in enumerate(flat)]
    else:
        along = 1 if axis == "row" else 0
        rows = [[(a * b).sum(along) for b in x[: i + 1]] for i, a in enumerate(x)]
    count = range(len(x))
    return torch.stack([torch.stack([rows[max(i, j)][min(i, j)] for j in count], -1) for i in count], -2)


@dataclass(frozen=True)
class Thresholds:
    """For each expert the magnitude that the `density` n largest entries of |d_i| reach, and only those equal besides.

    The bits of positive floats are ordered as the floats are: the threshold is found digit by digit, by counting.
    """

    least: list[float]

    @classmethod
    def of(cls, pieces: Pieces, hyper: Mapping[str, Any]) -> "Thresholds | None":
        if hyper.get("threshold") == "model":
            return None
        shapes = [(base.numel(), base.dtype, len(experts)) for base, experts in pieces]
        total, (_, dtype, count) = sum(size for size, _, _ in shapes), shapes[0]
        bits = torch.int64 if dtype == torch.float64 else torch.int32
        wanted = [max(1, round(hyper["density"] * total))] * count
        heads = [0] * count
        for shift in range(8 * bits.itemsize - DIGIT, -1, -DIGIT):
            counts = torch.zeros(count, 1 << DIGIT, dtype=torch.int64)
            for base, experts in pieces:
                for i, expert in enumerate(experts):
                    value = (expert - base).abs_().view(bits).flatten()
                    if shift < 8 * bits.itemsize - DIGIT:
                        value = value[value >> (shift + DIGIT) == heads[i]].bitwise_and_((1 << (shift + DIGIT)) - 1)
                    if shift:
                        value >>= shift
                    counts[i] += torch.bincount(value, minlength=1 << DIGIT).cpu()
            for i, row in enumerate(counts):
                reaching = row.flip(0).cumsum(0)
                from_top = int((reaching < wanted[i]).sum())
                wanted[i] -= int(reaching[from_top - 1]) if from_top else 0
                heads[i] = heads[i] << DIGIT | ((1 << DIGIT) - 1 - from_top)
        return cls(torch.tensor(heads, dtype=bits).view(dtype).tolist())
