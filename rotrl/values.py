"""What a value of the configuration may be, told once: by the type hint of the parameter that it goes to."""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Within:
    """An interval of allowed numbers; `above` excludes the lower end, `below` the upper."""

    low: float = float("-inf")
    high: float = float("inf")
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"be above {self.low:g}" if self.above else f"be {self.low:g} or more"
        return f"lie in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


Count = Annotated[int, Within(1)]
Density = Annotated[float, Within(0, 1, above=True)]
Share = Annotated[float, Within(0, 1)]
Part = Annotated[float, Within(0, 1, above=True, below=True)]
NonNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
Seed = Annotated[int, Within(0, 2**63 - 1)]
Rule = Literal["mean", "norm", "sum", "retention", "norm_global", "retention_global"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Rounding = Literal["nearest", "stochastic"]
Vocab = Literal["error", "pad", "truncate"]
LmHead = Literal["error", "tie", "untie"]
Nonfinite = Literal["error", "allow"]
Side = Literal["small", "large", "left", "right", "both"]
Sharing = Literal["none", "layer", "residual"]
Start = Literal["identity", "procrustes"]
Objective = Literal["logits", "activation", "weight"]

SHOWN = {None: "null", True: "true", False: "false"}
WORDS = {
    **{float: "a number", int: "a whole number", bool: "", str: "a text", Path: "a path"},
    **{NoneType: "null", Sequence: "a list", Mapping: "a map"},
}


def hint_of(annotation: ast.expr | None) -> Any:
    """The type hint that stands in a source file; Any where it has names that are not of this module.

    Read so because importing what is annotated (vLLM, Lightning) may take seconds.
    """
    if annotation is None:
        return Any
    try:
        return eval(compile(ast.Expression(annotation), "", "eval"), globals())
    except (NameError, AttributeError, TypeError):
        return Any


def faults_of(function: Callable[..., Any], given: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with keywords of a function, by its type hints."""
    hints = get_type_hints(function, include_extras=True)
    known = {key: value for key, value in given.items() if key in hints}
    return [fault for key, value in known.items() for fault in value_faults(f"{where}.{key}", value, hints[key])]


def value_faults(key: str, value: Any, hint: Any) -> list[str]:
    """What is wrong with a value, or with those in a list or map; a hint of no kind known here takes anything."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    fitting = [member for member in members if _fits(value, member)]
    if not fitting:
        shown = SHOWN[value] if value is None or isinstance(value, bool) else repr(value)
        *others, last = dict.fromkeys(word for member in members for word in _words(member))
        return [f"{key} is {shown}, {', '.join(others)}{' or ' * bool(others)}{last} is expected"]
    return min((_inside(key, value, member) for member in fitting), key=len)


def _kind(hint: Any) -> Any:
    """The class that a hint stands for: that of an Annotated, Sequence for all lists, Mapping for all maps."""
    if get_origin(hint) is Annotated:
        return _kind(get_args(hint)[0])
    found = get_origin(hint) or hint
    lists, maps = (Sequence, list, tuple), (Mapping, dict)
    return NoneType if found is None else Sequence if found in lists else Mapping if found in maps else found


def _fits(value: Any, hint: Any) -> bool:
    kind = _kind(hint)
    if kind is Literal:
        return value in get_args(hint)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind is Sequence:
        return isinstance(value, list | tuple)
    return kind not in WORDS or isinstance(value, (str, Path) if kind is Path else kind)


def _inside(key: str, value: Any, hint: Any) -> list[str]:
    kind = _kind(hint)
    if kind in (int, float):
        if isinstance(value, float) and not math.isfinite(value):
            return [f"{key} is {value}, a finite number is expected"]
        within = next((extra for extra in get_args(hint)[1:] if isinstance(extra, Within)), Within())
        return [] if value in within else [f"{key} is {value}, it must {within}"]
    if kind in (str, Path):
        return [] if str(value).strip() else [f"{key} is empty, {WORDS[kind]} is expected"]
    inner = [part for part in get_args(hint) if part is not Ellipsis]
    if kind is Sequence and inner:
        return [fault for i, part in enumerate(value) for fault in value_faults(f"{key}.{i}", part, inner[0])]
    if kind is Mapping and inner:
        return [fault for name, part in value.items() for fault in value_faults(f"{key}.{name}", part, inner[1])]
    return []


def _words(hint: Any) -> list[str]:
    if _kind(hint) is Literal:
        return [f"one of {', '.join(map(str, get_args(hint)))}"]
    return ["true", "false"] if _kind(hint) is bool else [WORDS[_kind(hint)]]
