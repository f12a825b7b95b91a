"""The merges of a configuration: one method, or a suite by label, each bound and checked before a weight is read."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import ConfigError
from rotrl.merge.bind import bind
from rotrl.merge.check import pattern_faults, renamed
from rotrl.merge.method import Method


def methods_of(cfg: Mapping[str, Any]) -> tuple[dict[str, Method], dict[str, str]]:
    """The merges by label, and the control that is applied by those that apply one.

    In a suite every merge that can apply deltas stands a second time for each control of the alignment: beside
    `learned` there is `learned_lora`.
    """
    methods = bind_methods(cfg["merge"], list(cfg["models"].get("experts") or {}))
    controls = [label for label, own in ((cfg["align"] or {}).get("controls") or {}).items() if own is not None]
    if "_target_" in (cfg["merge"] or {}):
        return methods, {}
    again = [(label, control) for label, method in methods.items() if method.takes_deltas for control in controls]
    more = {f"{label}_{control}": methods[label] for label, control in again}
    return methods | more, {f"{label}_{control}": control for label, control in again}


def bind_methods(merge: Mapping[str, Any] | None, experts: list[str]) -> dict[str, Method]:
    """{label: method}: one for a single method, labelled by its name, or one per entry of a suite."""
    if not merge:
        return {}
    if "_target_" in merge:
        method = bind(dict(merge), experts)
        return {method.name: method}
    methods, problems = {}, []
    for label, entry in merge.items():
        if entry is None:  # `merge.slerp=null` drops an arm
            continue
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            problems.append(f"merge.{label} is not a method: it has no _target_ (a suite maps labels to methods)")
            continue
        try:
            methods[label] = bind(dict(entry), experts)
        except ConfigError as error:
            problems.append(renamed(error, f"merge.{label}."))
    if problems:
        raise ConfigError("; ".join(problems))
    return methods


def check_names(experts: Mapping[str, Checkpoint], methods: Mapping[str, Method]) -> None:
    if taken := ({"base"} & experts.keys()) | (methods.keys() & {"base", *experts}):
        raise ConfigError(
            f"the name {sorted(taken)[0]!r} stands for two models; rename the expert or the suite's label"
        )


def check_patterns(base: Checkpoint, stack: Sequence[Method]) -> None:
    """Values of merge.per_layer that would count for no tensor."""
    if faults := [fault for method in stack for fault in pattern_faults(method.per_layer, list(base.tensors))]:
        raise ConfigError("; ".join(dict.fromkeys(faults)))


def check_grams(methods: Mapping[str, Method]) -> None:
    """Merges that would have the experts sampled, or read, in different ways."""
    asked = {label: method.gram for label, method in methods.items() if method.gram is not None}
    first = next(iter(asked), "")
    for label, gram in asked.items():
        if changed := [key for key in {**gram, **asked[first]} if gram.get(key) != asked[first].get(key)]:
            raise ConfigError(
                f"merge.{label}.gram.{changed[0]} differs from merge.{first}'s: one run gathers one set of Gram "
                "matrices; give both the same, or two runs"
            )


def check_device(cfg: Mapping[str, Any]) -> None:
    if cfg["merge"]:
        from rotrl.merge.stream import devices

        devices(cfg["device"])
