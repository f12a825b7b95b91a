"""From a configuration to a merge method: every key is checked against the signature before a weight is read."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from rotrl.checkpoint.layout import Role
from rotrl.checkpoint.rotations import Delta, Rotation
from rotrl.errors import ConfigError, NumericsError
from rotrl.merge.check import gram_faults, per_layer_of, rotations_faults, unknown, value_at, value_faults, weights_of
from rotrl.merge.linear import interpolation, linear, task_arithmetic
from rotrl.merge.scale import Merged, at_scale
from rotrl.merge.statistics import Statistics
from rotrl.merge.summary import Summary
from rotrl.merge.types import Matrix, Pair, Rows, Side

SCOPES = ("matrices", "all")
GIVEN = ("rotation", "rotations", "source", "merged", "statistics", "summary", "grams")  # by the engine, not the yaml
ENGINE_KEYS = ("_target_", "_partial_", "scope", "weights", "per_layer")


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
        """Files of the rotations of the base towards each expert; empty where the function finds them itself."""
        return dict(self.config.get("rotations") or {}) if "rotations" in self._parameters else {}

    @property
    def takes_deltas(self) -> bool:
        """Whether what it applies may be a Delta as well as a Rotation."""
        return Delta in get_args(get_type_hints(self.function).get("rotation"))

    @property
    def needs_source(self) -> bool:
        return "source" in self._parameters

    @property
    def scale(self) -> float | str | None:
        """The method's lambda or rule for it, None where it has none."""
        return self.of.scale if self.of else self.hyper.get("scale")

    def statistics(self) -> Statistics | None:
        """Empty statistics of the whole model for the engine to fill, None where the method needs none."""
        hint = get_type_hints(self.function).get("statistics")
        if hint is None:
            return None
        return next(kind for kind in (*get_args(hint), hint) if hasattr(kind, "needed")).needed(self.hyper)

    @property
    def passes(self) -> int:
        """How often the inputs are read: once, and once more for each method in the stack that needs statistics."""
        return (self.of.passes if self.of else 1) + (self.statistics() is not None)

    def side(self, tensor: str, role: Role) -> Side | None:
        """The side of a matrix that it, or the method under it, rotates in closed form."""
        values = self.per_layer.get("side", {})
        own = None if self.rotation_files else value_at(values, self.hyper.get("side"), tensor, role, None)
        return self.of.side(tensor, role) if own is None and self.of else own

    def acts_on(self, role: Role, dims: int) -> bool:
        """Whether the function merges this tensor; the linear rule does otherwise."""
        if self.scope == "matrices":
            return role.is_matrix
        return dims == 2 or get_type_hints(self.function, include_extras=True).get("base") != Matrix

    def by_rows(self, role: Role, dims: int) -> bool:
        """Whether a tensor of two or more dimensions can be merged in pieces of rows."""
        if not self.acts_on(role, dims):
            return dims > 1 and (self.of is None or self.of.by_rows(role, dims))
        return dims > 1 and get_type_hints(self.function, include_extras=True).get("base") == Rows

    def __call__(self, tensor: str, role: Role, base: Tensor, experts: Sequence[Tensor], **given: Any) -> Tensor:
        """The merge of a whole tensor; what is `given` as in `merge`."""
        [(_, _, merged)] = self.merge(tensor, role, [(base, experts)], **given)
        return merged

    def merge(
        self,
        tensor: str,
        role: Role,
        pieces: Sequence[tuple[Tensor, Sequence[Tensor]]],
        *,
        depth: float | None = None,
        rotation: Rotation | Delta | None = None,
        source: Tensor | None = None,
        merged: Tensor | None = None,
        statistics: Statistics | None = None,
        grams: Sequence[Tensor] | None = None,
        rotations: Sequence[Rotation | None] | None = None,
    ) -> Iterator[Merged]:
        """Base, experts and merge of each piece, by the function or, out of its scope, by `of` or the linear rule.

        The linear rule has the same scale. The pieces are consecutive rows if `by_rows`, else one whole tensor. `depth`
        goes from 0 at the first layer to 1 at the last.
        """
        hyper = self.hyper | {
            key: value_at(values, self.hyper.get(key), tensor, role, depth) for key, values in self.per_layer.items()
        }
        base, experts = pieces[0]
        if self.acts_on(role, base.ndim):
            function, parameters = self.function, self._parameters
        elif merged is not None:
            yield base, experts, merged
            return
        else:
            function, hyper = _linear_rule(hyper)
            parameters = inspect.signature(function).parameters
        given = {"rotation": rotation, "rotations": rotations, "source": source, "merged": merged}
        given |= {"statistics": statistics, "grams": grams}
        hyper |= {key: given[key] for key in given if key in parameters}
        if "summary" in parameters:
            hyper["summary"] = _summary(function).of(pieces, hyper)

        seed = hyper.get("seed", 0)

        def of_pieces(hyper: dict[str, Any]) -> Iterator[Merged]:
            for number, (base, experts) in enumerate(pieces):
                if "seed" in hyper:
                    hyper = hyper | {"seed": tensor_seed(seed, f"{tensor} {number}" if number else tensor)}
                yield base, experts, function(base, experts, **hyper)

        yield from at_scale(of_pieces, len(experts), hyper)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters


def _linear_rule(hyper: Mapping[str, Any]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    if "t" in hyper:
        return interpolation, {"t": hyper["t"]}
    known = {key: hyper[key] for key in ("scale", "weights") if key in hyper}
    return task_arithmetic if "scale" in known else linear, known


def _summary(function: Callable[..., Tensor]) -> type[Summary]:
    hint = get_type_hints(function)["summary"]
    return next(kind for kind in (*get_args(hint), hint) if hasattr(kind, "of"))


def bind(config: Mapping[str, Any], expert_names: Sequence[str]) -> Method:
    """Checks `config` against the function that its `_target_` names; ConfigError lists every fault at once."""
    function = _function(str(config.get("_target_", "")))
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function).parameters
    parameters = {name: hints[name] for name in signature if name not in ("base", "experts", *GIVEN)}
    on_top = "merged" in signature
    needs = {"of": on_top, "gram": "grams" in signature, "rotations": "rotations" in signature}
    sections = [key for key, needed in needs.items() if needed]
    problems = _key_faults(config, parameters, function.__name__, sections)
    if not expert_names:
        problems.append("no experts to merge; give models.experts")
    if hints.get("experts") == Pair and len(expert_names) != 2:
        problems.append(f"{function.__name__} merges two experts, not {len(expert_names)} ({', '.join(expert_names)})")
    hyper = {key: value for key, value in config.items() if key in parameters}
    if "weights" in hyper:
        hyper["weights"], faults = weights_of("weights", hyper["weights"], expert_names)
        problems += faults
    per_layer, faults = per_layer_of(config.get("per_layer"), parameters, expert_names)
    problems += faults
    if "gram" in sections:
        problems += gram_faults(config.get("gram", {}))
    if "rotations" in sections:
        problems += rotations_faults(config.get("rotations"), expert_names)
    of = None
    if on_top:
        try:
            of = bind(config.get("of") or {}, expert_names)
        except ConfigError as error:
            problems.append(str(error).replace("merge.", "merge.of."))
    if problems:
        raise ConfigError("; ".join(problems))
    method = Method(function.__name__, dict(config), function, hyper, config.get("scope") or "all", per_layer, of)
    _rehearse(method, len(expert_names))
    return method


def _rehearse(method: Method, count: int) -> None:
    """Raises what the function itself says to the weights (a sum of 0 that it would divide by), before any stage."""
    maps = method.per_layer.get("weights") or {}
    given = [weights for weights in (method.hyper.get("weights"), *maps.values()) if weights]
    generator = torch.Generator().manual_seed(0)
    base, *experts = torch.eye(4) + 0.01 * torch.randn(count + 1, 4, 4, generator=generator)
    for weights in given:
        statistics = method.statistics()
        if statistics is not None:
            statistics.add([(base, experts)])
        trial = replace(method, hyper={**method.hyper, "weights": weights}, per_layer={})
        with suppress(NumericsError):
            trial("", Role(0, "q"), base, experts, statistics=statistics)


def _key_faults(
    config: Mapping[str, Any], parameters: Mapping[str, Any], name: str, sections: Sequence[str]
) -> list[str]:
    """Unknown keys with the nearest known one, and wrong values."""
    allowed = [key for key in parameters if key != "weights"] + [*sections, "scope", "per_layer"]
    allowed += ["weights"] * ("weights" in parameters)
    problems = []
    for key, value in config.items():
        if key in parameters and key != "weights":
            problems += value_faults(key, value, parameters[key])
        elif key == "scope" and value not in SCOPES:
            problems.append(f"merge.scope is {value!r}, one of {', '.join(SCOPES)} is expected")
        elif key not in (*ENGINE_KEYS, *allowed) or (key == "weights" and key not in allowed and value is not None):
            problems.append(unknown(f"merge.{key}", name, allowed))
    return problems


def tensor_seed(seed: int, tensor: str) -> int:
    """A seed of its own for each tensor, the same in whatever order they are merged."""
    return int.from_bytes(hashlib.sha256(f"{seed} {tensor}".encode()).digest()[:8]) >> 1


def parameters_of(target: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of the function that a `_target_` names."""
    return inspect.signature(_function(target)).parameters


def _function(target: str) -> Callable[..., Tensor]:
    module, _, name = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
        names = list(inspect.signature(function).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"merge._target_ {target!r} is no merge method ({error}); name a function as in conf/merge/linear.yaml"
        ) from error
    if names[:2] != ["base", "experts"]:
        raise ConfigError(f"merge._target_ {target!r} is no merge method: its parameters must begin with base, experts")
    return function
