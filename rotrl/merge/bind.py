"""A method from its configuration: every key is checked against the signature before a weight is read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from inspect import Parameter
from typing import Any, get_type_hints

import torch

from rotrl.checkpoint.layout import Role
from rotrl.errors import ConfigError, NumericsError
from rotrl.merge.check import gram_faults, key_faults, per_layer_of, renamed, rotations_faults, weights_of
from rotrl.merge.method import GIVEN, Method
from rotrl.merge.signature import function_of, parameters_of
from rotrl.merge.types import Pair


def bind(config: Mapping[str, Any], expert_names: Sequence[str]) -> Method:
    """Checks `config` against the function that its `_target_` names; ConfigError lists every fault at once."""
    function = function_of(str(config.get("_target_", "")))
    hints = get_type_hints(function, include_extras=True)
    signature = parameters_of(function)
    parameters = {name: hints[name] for name in signature if name not in ("base", "experts", *GIVEN)}
    on_top = "merged" in signature
    needs = {"of": on_top, "gram": "grams" in signature, "rotations": "rotations" in signature}
    sections = [key for key, needed in needs.items() if needed]
    problems = key_faults(config, parameters, function.__name__, sections)
    if not expert_names:
        problems.append("no experts to merge; give models.experts")
    if get_type_hints(function).get("experts") == Pair and len(expert_names) != 2:
        problems.append(f"{function.__name__} merges two experts, not {len(expert_names)} ({', '.join(expert_names)})")
    hyper = {key: config.get(key, signature[key].default) for key in parameters}
    problems += [f"merge.{key} is missing" for key, value in hyper.items() if value is Parameter.empty]
    if "weights" in hyper:
        hyper["weights"], faults = weights_of("weights", hyper["weights"], expert_names)
        problems += faults
    per_layer, faults = per_layer_of(config.get("per_layer"), parameters, expert_names)
    problems += faults
    if "statistics" in signature:
        whole = [key for key in ("threshold", "relative") if key in per_layer]
        problems += [f"merge.per_layer.{key}: it counts for the whole model; use merge.{key}" for key in whole]
    if "gram" in sections:
        problems += gram_faults(config.get("gram", {}))
    if "rotations" in sections:
        problems += rotations_faults(config.get("rotations"), expert_names)
    of, under = None, config.get("of") or {}
    if on_top and not isinstance(under, Mapping):
        problems.append(f"merge.of is {under!r}, which is no method; choose one by merge@merge.of=NAME")
    elif on_top:
        try:
            of = bind(under, expert_names)
        except ConfigError as error:
            problems.append(renamed(error, "merge.of."))
    if problems:
        raise ConfigError("; ".join(problems))
    method = Method(function.__name__, dict(config), function, hyper, config.get("scope") or "", per_layer, of)
    if not method.scope:
        method = replace(method, scope="matrices" if method.kind == "matrix" else "all")
    if method.scope == "all" and method.needs_whole:
        raise ConfigError(
            f"merge.scope=all: {method.needs_whole} takes matrices whole, for which embeddings are too large; "
            "use merge.scope=matrices"
        )
    _rehearse(method, len(expert_names))
    return method


def _rehearse(method: Method, count: int) -> None:
    """Raises what the function itself says to its parameters, before any stage: weights that sum to 0, say."""
    generator = torch.Generator().manual_seed(0)
    base, *experts = torch.eye(4) + 0.01 * torch.randn(count + 1, 4, 4, generator=generator)
    given = {"factor": 1.0, "source": experts[0], "merged": experts[0]}
    for hyper in _variants(method):
        statistics = method.statistics()
        if statistics is not None:
            statistics.add([(base, experts)])
        with suppress(NumericsError):
            replace(method, hyper=hyper, per_layer={})("", Role(0, "q"), base, experts, statistics=statistics, **given)


def _variants(method: Method) -> Iterator[dict[str, Any]]:
    """The parameters as they stand, and with what is given by layer: the ends of all lists, and what a pattern has."""
    yield method.hyper
    lists = {key: values for key, values in method.per_layer.items() if isinstance(values, list)}
    for end in (0, -1) if lists else ():
        yield method.hyper | {key: values[end] for key, values in lists.items()}
    maps = {key: values for key, values in method.per_layer.items() if isinstance(values, Mapping)}
    for pattern in dict.fromkeys(pattern for values in maps.values() for pattern in values):
        yield method.hyper | {key: values[pattern] for key, values in maps.items() if pattern in values}
