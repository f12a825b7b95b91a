"""A bound merge method: which tensors it acts on, in which pieces, and their merge."""

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from rotrl.checkpoint.layout import Role
from rotrl.checkpoint.rotations import Delta, Rotation
from rotrl.merge.check import value_at
from rotrl.merge.chunks import rows_of
from rotrl.merge.linear import linear_rule, shares
from rotrl.merge.scale import GLOBAL, Merged, at_scale, mean_as_number
from rotrl.merge.signature import class_of, kind_of, parameters_of, unless_of
from rotrl.merge.span import TALL, in_their_span
from rotrl.merge.statistics import Statistics
from rotrl.merge.types import Pair, Side

GIVEN = ("rotation", "rotations", "source", "merged", "statistics", "summary", "grams")  # by the engine, not the yaml


@dataclass(frozen=True)
class Method:
    """A bound method. `config` is what it was made from, `hyper` the keywords of `function`.

    `of` is the method whose merge a function with a parameter `merged` works on.
    """

    name: str
    config: dict[str, Any]
    function: Callable[..., Tensor]
    hyper: dict[str, Any]
    scope: str
    per_layer: dict[str, Any] = field(default_factory=dict)
    of: "Method | None" = None

    @property
    def needs_rotations(self) -> bool:
        return "rotation" in self._parameters or (self.of is not None and self.of.needs_rotations)

    @property
    def gram(self) -> dict[str, Any] | None:
        """How the Gram matrices that the function or the one under it needs are gathered; None if they need none."""
        if "grams" in self._parameters:
            return dict(self.config.get("gram") or {})
        return self.of.gram if self.of else None

    @property
    def rotation_files(self) -> dict[str, str]:
        """Files of the rotations of the base towards each expert, for the function or the one under it; empty where
        they are found in closed form."""
        if "rotations" in self._parameters:
            return dict(self.config.get("rotations") or {})
        return self.of.rotation_files if self.of else {}

    @property
    def takes_deltas(self) -> bool:
        """Whether what it applies may be a Delta as well as a Rotation."""
        return Delta in get_args(get_type_hints(self.function).get("rotation"))

    @property
    def scale(self) -> float | str | None:
        """The method's lambda or rule for it, None where it has none."""
        return self.of.scale if self.of else self.hyper.get("scale")

    def statistics(self) -> Statistics | None:
        """Empty statistics of the whole model for the engine to fill, None where the method needs none."""
        kind = class_of(self.function, "statistics", "needed")
        return kind.needed(self.hyper) if kind else None

    @property
    def precision(self) -> torch.dtype:
        """What it computes in: float64 where it, or the method under it, asks for that."""
        asked = self.config.get("precision") == "float64"
        return torch.float64 if asked or (self.of and self.of.precision == torch.float64) else torch.float32

    @property
    def passes(self) -> int:
        """How often the inputs are read: once, and once more for each method in the stack that needs a first pass."""
        first = (self.statistics() is not None) + (self.hyper.get("scale") in GLOBAL)
        return (self.of.passes if self.of else 1) + first

    def side(self, tensor: str, role: Role) -> Side | None:
        """The side of a matrix that it, or the method under it, rotates in closed form."""
        values = self.per_layer.get("side", {})
        own = None if self.rotation_files else value_at(values, self.hyper.get("side"), tensor, role, None)
        return self.of.side(tensor, role) if own is None and self.of else own

    def acts_on(self, role: Role, dims: int) -> bool:
        """Whether the function merges this tensor; the linear rule does otherwise."""
        if self.scope == "matrices":
            return role.is_matrix
        return dims == 2 or self.kind not in ("matrix", "equivariant", "slices")

    @property
    def merges_a_pair(self) -> bool:
        return get_type_hints(self.function).get("experts") == Pair

    def averages(self, hyper: Mapping[str, Any]) -> bool:
        """Whether it gives the experts' mean, by its nature or by the parameter `normalize`, and not their sum."""
        hint = get_type_hints(self.function, include_extras=True).get("experts")
        return "averaged" in get_args(hint) or hyper.get("normalize") is True

    @property
    def kind(self) -> str:
        """What the function's base is: matrix, equivariant, slices, rows, or "" for any tensor."""
        return kind_of(self.function)

    @property
    def needs_whole(self) -> str:
        """The choice by which a tall matrix can't be merged by rows, in words; "" where it can."""
        if self.kind == "matrix":
            return self.name
        for key, value in unless_of(self.function):
            if value in (self.hyper.get(key), *self.per_layer.get(key, {}).values()):
                return f"merge.{key}={value}"
        return ""

    def rows(self, tensor: str, role: Role, shape: Sequence[int]) -> int | None:
        """How many rows of a tensor are merged at a time; None where it is merged whole."""
        if len(shape) < 2:
            return None
        below = self.of.rows(tensor, role, shape) if self.of else rows_of(shape)
        if not self.acts_on(role, len(shape)) or self.kind == "rows":
            return below
        if self.kind == "slices":
            height = value_at(self.per_layer.get("height", {}), self.hyper["height"], tensor, role, None)
            return rows_of(shape, min(height, *shape))
        tall = self.kind == "equivariant" and not self.needs_whole and shape[0] >= TALL * shape[1]
        return below if tall else None

    def __call__(self, tensor: str, role: Role, base: Tensor, experts: Sequence[Tensor], **given: Any) -> Tensor:
        """The merge of a whole tensor; what is `given` as in `merge`, source and merged as tensors."""
        given |= {key: [given[key]] for key in ("source", "merged") if given.get(key) is not None}
        [(_, _, merged)] = self.merge(tensor, role, [(base, experts)], **given)
        return merged

    def merge(
        self,
        tensor: str,
        role: Role,
        pieces: Sequence[tuple[Tensor, Sequence[Tensor]]],
        *,
        depth: float | None = None,
        factor: float | None = None,
        rotation: Rotation | Delta | None = None,
        source: Iterable[Tensor] | None = None,
        merged: Iterable[Tensor] | None = None,
        statistics: Statistics | None = None,
        grams: Sequence[Tensor] | None = None,
        rotations: Sequence[Rotation | None] | None = None,
    ) -> Iterator[Merged]:
        """Base, experts and merge of each piece, by the function or, out of its scope, by `of` or the linear rule.

        The linear rule has the same scale. The pieces are consecutive `rows`, or one whole tensor; `source` and
        `merged`, which may be gone through repeatedly, are in the same pieces. `depth` goes from 0 at the first layer
        to 1 at the last, `factor` is that of a scale for the whole model.
        """
        hyper = self.hyper | {
            key: value_at(values, self.hyper.get(key), tensor, role, depth) for key, values in self.per_layer.items()
        }
        dims, count = pieces[0][0].ndim, len(pieces[0][1])
        if self.acts_on(role, dims):
            function, parameters = self.function, self._parameters
        elif merged is not None:
            yield from ((base, experts, below) for (base, experts), below in zip(pieces, merged, strict=True))
            return
        else:
            if "scale" in hyper and self.averages(hyper):
                hyper = mean_as_number(hyper, count)  # of the weights as they were given
                hyper["weights"] = shares(hyper.get("weights"), count, positive=True)
            function, hyper = linear_rule(hyper, pair=self.merges_a_pair)
            parameters = parameters_of(function)
        given = {"rotation": rotation, "rotations": rotations, "statistics": statistics, "grams": grams}
        hyper |= {key: given[key] for key in given if key in parameters}
        in_pieces = {"source": source, "merged": merged}
        beside = {key: values for key, values in in_pieces.items() if key in parameters and values is not None}
        if "summary" in parameters:
            hyper["summary"] = class_of(function, "summary", "of").of(pieces, hyper)
        elif len(pieces) > 1 and function is self.function and self.kind == "equivariant":
            function = in_their_span(function, pieces, beside)

        seed = hyper.get("seed", 0)

        def of_pieces(hyper: dict[str, Any]) -> Iterator[Merged]:
            for number, ((base, experts), *more) in enumerate(zip(pieces, *beside.values(), strict=True)):
                hyper = hyper | dict(zip(beside, more, strict=True))
                if "seed" in hyper:
                    hyper = hyper | {"seed": tensor_seed(seed, f"{tensor} {number}" if number else tensor)}
                yield base, experts, function(base, experts, **hyper)

        yield from at_scale(of_pieces, count, hyper, factor)

    @property
    def _parameters(self) -> Container[str]:
        return parameters_of(self.function)


def tensor_seed(seed: int, tensor: str) -> int:
    """A seed of its own for each tensor, the same in whatever order they are merged."""
    return int.from_bytes(hashlib.sha256(f"{seed} {tensor}".encode()).digest()[:8]) >> 1
