"""What the function of a merge method says of itself by its signature."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from torch import Tensor

from rotrl.errors import ConfigError
from rotrl.merge.types import Unless

Function = Callable[..., Tensor]


def function_of(target: str) -> Function:
    """The function that a `_target_` names; ConfigError where that is no merge method."""
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


def parameters_of(function: Function | str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function or of the one that a `_target_` names."""
    return inspect.signature(function_of(function) if isinstance(function, str) else function).parameters


def kind_of(function: Function) -> str:
    """What its base is (merge.types): matrix, equivariant, slices, rows, or "" for any tensor."""
    return next((extra for extra in _of_base(function) if isinstance(extra, str)), "")


def unless_of(function: Function) -> list[tuple[str, str]]:
    """Parameters, each with the choice by which an equivariant function is none."""
    return [choice for extra in _of_base(function) if isinstance(extra, Unless) for choice in extra.choices]


def class_of(function: Function, parameter: str, protocol: str) -> Any:
    """The class in a parameter's type that has the constructor `protocol`, None without the parameter."""
    hint = get_type_hints(function).get(parameter)
    return next((kind for kind in (*get_args(hint), hint) if hasattr(kind, protocol)), None)


def _of_base(function: Function) -> tuple[Any, ...]:
    return get_args(get_type_hints(function, include_extras=True).get("base"))[1:]
