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


Matrix = Annotated[Tensor, "out x in"]
"""The base of a method that acts on 2-D tensors only; all others go by the linear rule."""

Rows = Annotated[Tensor, "rows"]
"""The base of a method that merges a tensor row by row, given a `summary` of the whole where it has that parameter."""

Pair = tuple[Tensor, Tensor]
"""The experts of a method for exactly two."""

Density = Annotated[float, Within(0, 1, above=True)]
Share = Annotated[float, Within(0, 1)]
NonNegative = Annotated[float, Within(0)]
Side = Literal["left", "right"]
