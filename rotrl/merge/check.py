"""What is wrong with the values of a merge configuration, each fault in words that name its key."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from rotrl.checkpoint.layout import MATRICES, Role
from rotrl.merge.scale import GLOBAL
from rotrl.values import Count, Rule
from rotrl.values import value_faults as faults_of_value

MODULES = (*MATRICES, "embedding", "head", "norm", "bias", "other")
GRAM = ("layers", "batch", "max_tokens", "samples")
CHOICES = {"scope": ("matrices", "all"), "precision": ("float32", "float64")}
ENGINE_KEYS = ("_target_", "_partial_", *CHOICES, "weights", "per_layer")


def value_faults(key: str, value: Any, hint: Any) -> list[str]:
    """What is wrong with a value by the type hint of its parameter; `scale` may name a rule."""
    return faults_of_value(f"merge.{key}", value, hint | Rule if _is_scale(key) else hint)


def key_faults(
    config: Mapping[str, Any], parameters: Mapping[str, Any], name: str, sections: Sequence[str]
) -> list[str]:
    """Unknown keys with the nearest known one, and wrong values."""
    allowed = [key for key in parameters if key != "weights"] + [*sections, *CHOICES, "per_layer"]
    allowed += ["weights"] * ("weights" in parameters)
    problems = []
    for key, value in config.items():
        if key in parameters and key != "weights":
            problems += value_faults(key, value, parameters[key])
        elif key in CHOICES and value not in CHOICES[key]:
            problems.append(f"merge.{key} is {value!r}, one of {', '.join(CHOICES[key])} is expected")
        elif key not in (*ENGINE_KEYS, *allowed) or (key == "weights" and key not in allowed and value is not None):
            problems.append(unknown(f"merge.{key}", name, allowed))
    if config.get("scale") in GLOBAL and "scale" in (config.get("per_layer") or {}):
        problems.append(f"merge.scale={config['scale']} is one factor for all tensors; leave out merge.per_layer.scale")
    return problems


def weights_of(key: str, weights: Any, expert_names: Sequence[str]) -> tuple[list[float] | None, list[str]]:
    """The map by expert name as a list in the experts' order, and what is wrong with it."""
    if weights is None:
        return None, []
    if not isinstance(weights, Mapping):
        return None, [f"merge.{key} is {weights!r}, a map from expert to number is expected"]
    problems = [
        f"merge.{key} names {name!r}, the experts are {', '.join(expert_names)}"
        for name in weights
        if name not in expert_names
    ]
    problems += [f"merge.{key} lacks expert {name!r}" for name in expert_names if name not in weights]
    for name, value in weights.items():
        problems += value_faults(f"{key}.{name}", value, float)
    return None if problems else [float(weights[name]) for name in expert_names], problems


def per_layer_of(
    per_layer: Any, hints: Mapping[str, Any], expert_names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """`merge.per_layer` with its weights as lists, and what is wrong with it.

    A map from parameter to values: a list, interpolated over depth from the first layer to the last, or a map from
    module (q, k, ..., norm) or regular expression on the tensor name to a value, the first match holds.
    """
    if per_layer is None:
        return {}, []
    if not isinstance(per_layer, Mapping):
        return {}, [f"merge.per_layer is {per_layer!r}, a map from parameter to values is expected"]
    found: dict[str, Any] = {}
    problems: list[str] = []
    for name, values in per_layer.items():
        key = f"per_layer.{name}"
        if name not in hints:
            problems.append(unknown(f"merge.{key}", "the method", list(hints)))
        elif isinstance(values, Sequence) and not isinstance(values, str):
            problems += _list_faults(key, values, hints[name])
            found[name] = list(values)
        elif isinstance(values, Mapping):
            found[name] = dict(values)
            for pattern, value in values.items():
                problems += _pattern_faults(key, str(pattern))
                if name == "weights":
                    found[name][pattern], faults = weights_of(f"{key}.{pattern}", value, expert_names)
                else:
                    faults = value_faults(f"{key}.{pattern}", value, hints[name])
                    if _is_scale(key) and value in GLOBAL:
                        faults.append(f"merge.{key}.{pattern} is {value}, one factor for all tensors; use merge.scale")
                problems += faults
        else:
            problems.append(f"merge.{key} is {values!r}, a list over depth or a map by module or pattern is expected")
    return found, problems


def pattern_faults(per_layer: Mapping[str, Any], tensors: Sequence[str]) -> list[str]:
    """Patterns of `merge.per_layer` that are found in no tensor's name, so that their values would never count."""
    return [
        f"merge.per_layer.{name}: {pattern!r} is neither a module ({', '.join(MODULES)}) nor found in a tensor's name"
        for name, values in per_layer.items()
        if isinstance(values, Mapping)
        for pattern in map(str, values)
        if pattern not in MODULES and not any(re.search(pattern, tensor) for tensor in tensors)
    ]


def gram_faults(gram: Any) -> list[str]:
    """What is wrong with `merge.gram`: layers, batch and max_tokens are whole numbers of 1 or more, or null."""
    if not isinstance(gram, Mapping):
        return [f"merge.gram is {gram!r}, a map of {', '.join(GRAM)} is expected"]
    problems = [unknown(f"merge.gram.{key}", "the Gram stage", GRAM) for key in gram if key not in GRAM]
    for key, value in gram.items():
        if key in GRAM and key != "samples" and value is not None:
            problems += value_faults(f"gram.{key}", value, Count)
    return problems


def rotations_faults(files: Any, expert_names: Sequence[str]) -> list[str]:
    """What is wrong with `merge.rotations`: a file for every expert, or null."""
    if files is None:
        return []
    if not isinstance(files, Mapping) or not all(isinstance(path, str) for path in files.values()):
        return [f"merge.rotations is {files!r}, a map from expert to rotations.safetensors is expected"]
    problems = [
        f"merge.rotations names {name!r}, the experts are {', '.join(expert_names)}"
        for name in files
        if name not in expert_names
    ]
    return problems + [f"merge.rotations lacks expert {name!r}" for name in expert_names if name not in files]


def renamed(error: Exception, key: str) -> str:
    """What an error says of keys `merge.X`, of X where it stands."""
    return re.sub(r"(?<![\w.])merge\.", key, str(error))


def unknown(key: str, owner: str, known: Sequence[str]) -> str:
    """The words for a key that is not among the known ones, with the nearest of them."""
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"unknown parameter {key} of {owner}{hint} (it takes {', '.join(known)})"


def value_at(values: Any, default: Any, tensor: str, role: Role, depth: float | None) -> Any:
    """A per-layer parameter for a tensor at `depth` (0 first layer, 1 last); `default` where it has none."""
    if isinstance(values, list):
        if depth is None:
            return default
        position = depth * (len(values) - 1)
        low = min(int(position), len(values) - 2) if len(values) > 1 else 0
        return values[low] + (position - low) * (values[min(low + 1, len(values) - 1)] - values[low])
    for pattern, value in values.items():
        if role.module == pattern if pattern in MODULES else re.search(pattern, tensor):
            return value
    return default


def _is_scale(key: str) -> bool:
    return "scale" in key.split(".")


def _list_faults(key: str, values: Sequence[Any], hint: Any) -> list[str]:
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if kind is not float or not values:
        return [f"merge.{key} is {list(values)}; only numbers are interpolated over depth, use a map by module"]
    problems = [fault for i, value in enumerate(values) for fault in value_faults(f"{key}.{i}", value, hint)]
    if any(isinstance(value, str) for value in values):
        problems.append(f"merge.{key} is {list(values)}; rules can't be interpolated, use a map by module")
    return problems


def _pattern_faults(key: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [
            f"merge.{key}: {pattern!r} is neither a module ({', '.join(MODULES)}) nor a regular expression ({error})"
        ]
    return []
