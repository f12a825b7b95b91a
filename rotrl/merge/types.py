"""What a method's signature may say about itself: `bind` checks configurations against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from rotrl.values import Count as Count
from rotrl.values import Density as Density
from rotrl.values import NonNegative as NonNegative
from rotrl.values import Positive as Positive
from rotrl.values import Share as Share
from rotrl.values import Within as Within


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

Averaged = Annotated[Sequence[Tensor], "averaged"]
"""The experts of a method that gives their mean and not their sum; the linear rule for the rest does as it."""

Side = Literal["left", "right"]
