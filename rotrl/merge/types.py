"""What a method's signature may say about itself: `bind` checks configurations against it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor


@dataclass(frozen=True)
class Within:
    """An interval of allowed numbers; `above` excludes the lower end."""

    low: float = float("-inf")
    high: float = float("inf")
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.above else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Unless:
    """Parameters, each with the choice by which an Equivariant method is none and needs whole matrices."""

    choices: tuple[tuple[str, str], ...]


Matrix = Annotated[Tensor, "matrix"]
"""The base of a method that merges matrices of attention and MLP, each whole; all others go by the linear rule."""

Equivariant = Annotated[Tensor, "equivariant"]
"""The base of a method of 2-D tensors with f(Q W0, Q W_1, ...) = Q f(W0, W_1, ...) for all Q with orthonormal columns.

A very tall one, an embedding, is merged in a basis (`span`), any other whole.
"""

Slices = Annotated[Tensor, "slices"]
"""The base of a method that merges each slice of `height` rows of a matrix by itself; matrices only."""

Rows = Annotated[Tensor, "rows"]
"""The base of a method that merges a tensor row by row, given a `summary` of the whole where it has that parameter."""

Pair = tuple[Tensor, Tensor]
"""The experts of a method for exactly two."""

Density = Annotated[float, Within(0, 1, above=True)]
Share = Annotated[float, Within(0, 1)]
NonNegative = Annotated[float, Within(0)]
Side = Literal["left", "right"]
