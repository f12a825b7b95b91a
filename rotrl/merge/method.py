"""From a configuration to a merge method: every key is checked against the signature before a weight is read."""

import difflib
import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from rotrl.checkpoint.layout import Role
from rotrl.checkpoint.rotations import Rotation
from rotrl.errors import ConfigError
from rotrl.merge.linear import interpolation, linear, task_arithmetic
from rotrl.merge.types import Matrix, Pair, Within

SCOPES = ("matrices", "all")
GIVEN = ("rotation", "source")  # by the engine, not by the configuration
ENGINE_KEYS = ("_target_", "_partial_", "scope", "weights")


@dataclass(frozen=True)
class Method:
    """A bound method. `config` is what it was made from, `hyper` the keywords of `function`."""

    name: str
    config: dict[str, Any]
    function: Callable[..., Tensor]
    hyper: dict[str, Any]
    scope: str

    @property
    def needs_rotations(self) -> bool:
        return "rotation" in self._parameters

    @property
    def needs_source(self) -> bool:
        return "source" in self._parameters

    def acts_on(self, role: Role, dims: int) -> bool:
        """Whether the function merges this tensor; the linear rule does otherwise."""
        if self.scope == "matrices":
            return role.is_matrix
        return dims == 2 or get_type_hints(self.function, include_extras=True).get("base") != Matrix

    def __call__(
        self,
        tensor: str,
        role: Role,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        rotation: Rotation | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """The merged tensor, by the function or, out of its scope, by the linear rule at the same scale."""
        if not self.acts_on(role, base.ndim):
            return self._linear_rule(base, experts)
        given = {"rotation": rotation, "source": source}
        hyper = self.hyper | {key: given[key] for key in GIVEN if key in self._parameters}
        if "seed" in hyper:
            hyper["seed"] = tensor_seed(hyper["seed"], tensor)
        return self.function(base, experts, **hyper)

    def _linear_rule(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        if "t" in self.hyper:
            return interpolation(base, (experts[0], experts[1]), t=self.hyper["t"])
        weights = self.hyper.get("weights")
        if "scale" in self.hyper:
            return task_arithmetic(base, experts, scale=self.hyper["scale"], weights=weights)
        return linear(base, experts, weights=weights)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters


def bind(config: Mapping[str, Any], expert_names: Sequence[str]) -> Method:
    """Checks `config` against the function that its `_target_` names; ConfigError lists every fault at once."""
    function = _function(str(config.get("_target_", "")))
    hints = get_type_hints(function, include_extras=True)
    parameters = [name for name in inspect.signature(function).parameters if name not in ("base", "experts", *GIVEN)]
    allowed = [*(name for name in parameters if name != "weights"), "scope", "weights"]
    if "weights" not in parameters:
        allowed.remove("weights")
    problems = []
    for key, value in config.items():
        if key in parameters and key != "weights":
            problems += _faults(key, value, hints[key])
        elif key == "scope" and value not in SCOPES:
            problems.append(f"merge.scope is {value!r}, one of {', '.join(SCOPES)} is expected")
        elif key not in ENGINE_KEYS or (key == "weights" and key not in parameters and value is not None):
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            problems.append(
                f"unknown parameter merge.{key} of {function.__name__}{hint} (it takes {', '.join(allowed)})"
            )
    if not expert_names:
        problems.append("no experts to merge; give models.experts")
    if hints.get("experts") == Pair and len(expert_names) != 2:
        problems.append(f"{function.__name__} merges two experts, not {len(expert_names)} ({', '.join(expert_names)})")
    hyper = {key: value for key, value in config.items() if key in parameters}
    if "weights" in hyper:
        hyper["weights"], faults = _weights(hyper["weights"], expert_names)
        problems += faults
    if problems:
        raise ConfigError("; ".join(problems))
    return Method(function.__name__, dict(config), function, hyper, config.get("scope") or "all")


def tensor_seed(seed: int, tensor: str) -> int:
    """A seed of its own for each tensor, the same in whatever order they are merged."""
    return int.from_bytes(hashlib.sha256(f"{seed} {tensor}".encode()).digest()[:8]) >> 1


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


def _faults(key: str, value: Any, hint: Any) -> list[str]:
    """What is wrong with a value, by its type hint: a number (in an interval), a truth value, or one of some words."""
    if get_origin(hint) is Literal:
        words = get_args(hint)
        return [] if value in words else [f"merge.{key} is {value!r}, one of {', '.join(words)} is expected"]
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    accepted = {float: (int, float), int: (int,), bool: (bool,)}.get(kind)
    if accepted is None:
        return []
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        word = {float: "a number", int: "a whole number", bool: "true or false"}[kind]
        return [f"merge.{key} is {value!r}, {word} is expected"]
    if not math.isfinite(value):
        return [f"merge.{key} is {value}, a finite number is expected"]
    interval = next((extra for extra in extras if isinstance(extra, Within)), None)
    if interval is not None and value not in interval:
        return [f"merge.{key} is {value}, it must lie in {interval}"]
    return []


def _weights(weights: Any, expert_names: Sequence[str]) -> tuple[list[float] | None, list[str]]:
    """The map by expert name as a list in the experts' order, and what is wrong with it."""
    if weights is None:
        return None, []
    if not isinstance(weights, Mapping):
        return None, [f"merge.weights is {weights!r}, a map from expert to number is expected"]
    problems = []
    for name in weights:
        if name not in expert_names:
            problems.append(f"merge.weights names {name!r}, the experts are {', '.join(expert_names)}")
    problems += [f"merge.weights lacks expert {name!r}" for name in expert_names if name not in weights]
    for name, value in weights.items():
        problems += _faults(f"weights.{name}", value, float)
    return None if problems else [float(weights[name]) for name in expert_names], problems
