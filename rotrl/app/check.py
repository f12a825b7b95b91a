"""Keys and choices that nothing reads: each is an error that names the nearest one that is read."""

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rotrl import config
from rotrl.checkpoint.rounding import ROUNDINGS
from rotrl.errors import ConfigError
from rotrl.evaluate.engine_settings import OWN, vllm_settings
from rotrl.evaluate.sampling import Sampling
from rotrl.merge.stream import devices

Section = tuple[str, Mapping[str, Any], Sequence[str]]

SAMPLING = tuple(field.name for field in fields(Sampling))
# What a group takes beside the keys of its shipped presets.
MORE = {"protocol": (*SAMPLING, "system", "chat_template_kwargs")}
SANDBOX = ("rotrl.evaluate.sandbox.ladder.open_sandbox", "rotrl.evaluate.sandbox.server.Limits")
LEARN = "rotrl.align.learn.learn"  # what a family of the learned fits does not take itself, it passes on
GIVEN = (  # by the pipeline or by a family, not by the configuration
    *("base", "experts", "out", "rollouts", "trainer", "seed", "progress", "vectors", "references"),
    *("family", "build", "hyper"),
)


def check_keys(cfg: Mapping[str, Any]) -> None:
    """ConfigError that names every unknown key of every group, whether or not the run uses the group."""
    problems = [
        config.unknown_key(f"{where}.{key}", known)
        for where, node, known in _sections(cfg)
        for key in map(str, node)
        if key not in known and not key.startswith("_")
    ]
    for key, choices in (("dtype", ("auto", "float32", "bfloat16", "float16")), ("rounding", ROUNDINGS)):
        if cfg[key] not in choices:
            problems.append(f"{key} is {cfg[key]!r}, one of {', '.join(choices)} is expected")
    try:
        devices(cfg["device"])
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))


def check_samples(where: str, samples: Any) -> list[str]:
    """What is wrong with how experts are sampled."""
    if not isinstance(samples, Mapping) or not isinstance(samples.get("sampling"), Mapping):
        return [f"{where} is {samples!r}; give {{n: 2, sampling: {{temperature, top_p, top_k, max_tokens}}}}"]
    n = samples.get("n")
    return [] if isinstance(n, int) and n > 0 else [f"{where}.n is {n!r}; give a number of samples, at least 1"]


def _sections(cfg: Mapping[str, Any]) -> Iterator[Section]:
    for group in ("models", "evidence", "evaluation", "protocol", "logger"):
        yield group, cfg[group] or {}, tuple(dict.fromkeys((*_shipped(group), *MORE.get(group, ()))))
    limits = (key for target in SANDBOX for key in _parameters(target))
    yield "evaluation.sandbox", (cfg["evaluation"] or {}).get("sandbox") or {}, tuple(limits)
    if importlib.util.find_spec("vllm"):
        yield "engine", cfg["engine"], sorted({*vllm_settings(), *OWN})
    yield "trainer", cfg["trainer"], _parameters("pytorch_lightning.trainer.trainer.Trainer")
    for group, kinds in (("models", ("experts", "controls", "prompts")), ("evaluation", ("tasks",))):
        for kind in kinds:
            for name, node in ((cfg[group] or {}).get(kind) or {}).items():
                yield from _call(f"{group}.{kind}.{name}", node)
    for key in ("geometry", "function"):
        yield from _stage(f"evidence.{key}", cfg["evidence"].get(key))
    yield from _stage("align", cfg["align"])
    for label, node in ((cfg["align"] or {}).get("controls") or {}).items():
        yield from _stage(f"align.controls.{label}", node)
    merges = {"merge": cfg["merge"]} if "_target_" in (cfg["merge"] or {}) else cfg["merge"] or {}
    for label, node in merges.items():
        if isinstance(node, Mapping) and isinstance(node.get("gram"), Mapping):
            yield from _samples(f"{label}.gram", node["gram"].get("samples"))


def _stage(where: str, node: Any) -> Iterator[Section]:
    """A stage's function, and how it has the experts sampled."""
    if node is None:
        return
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{where} is {node!r}, which is no stage: it has no _target_; choose one by {where}=NAME")
    known = [key for key in _parameters(node["_target_"]) if key not in GIVEN]
    if known:
        yield where, node, (*known, "samples", "controls")
    yield from _samples(where, node.get("samples"))


def _samples(where: str, samples: Any) -> Iterator[Section]:
    if samples is None:
        return
    if faults := check_samples(f"{where}.samples", samples):
        raise ConfigError("; ".join(faults))
    yield f"{where}.samples", samples, ("n", "sampling")
    yield f"{where}.samples.sampling", samples["sampling"], SAMPLING


def _call(where: str, node: Any) -> Iterator[Section]:
    if isinstance(node, Mapping) and "_target_" in node and (known := _parameters(node["_target_"])):
        yield where, node, known


@cache
def _shipped(group: str) -> tuple[str, ...]:
    """The keys of all presets of a group."""
    folder = Path(config.config_dir()) / group
    presets = [yaml.safe_load(path.read_text()) or {} for path in sorted(folder.rglob("*.yaml"))]
    return tuple(dict.fromkeys(key for preset in presets for key in preset if key not in ("defaults", group)))


@cache
def _parameters(target: str) -> tuple[str, ...]:
    """The parameters of a function or class by its source, because importing it may take seconds; () if not found."""
    module, _, name = target.rpartition(".")
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ()
    stem = Path(spec.origin).parent.joinpath(*inner)
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    body = ast.parse(path.read_text()).body if path.is_file() else []
    found = next((node for node in body if getattr(node, "name", None) == name), None)
    if isinstance(found, ast.ClassDef):
        init = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
        if init is None:  # a dataclass
            fields_of = (node for node in found.body if isinstance(node, ast.AnnAssign))
            return tuple(node.target.id for node in fields_of if isinstance(node.target, ast.Name))
        found = init
    if not isinstance(found, ast.FunctionDef):
        return ()
    own = tuple(argument.arg for argument in (*found.args.args, *found.args.kwonlyargs))
    return (*own, *_parameters(LEARN)) if found.args.kwarg and target != LEARN else own
