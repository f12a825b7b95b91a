"""Keys and values that no stage can use: all are told at once, each with the nearest key or what is expected."""

import ast
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from rotrl import config
from rotrl.errors import Absent, ConfigError, RotrlError
from rotrl.evaluate.engine_settings import engine_hints
from rotrl.evaluate.sampling import Sampling
from rotrl.values import Count, hint_of, value_faults

SANDBOX = ("rotrl.evaluate.sandbox.ladder.open_sandbox", "rotrl.evaluate.sandbox.server.Limits")
LEARN = "rotrl.align.learn.learn"  # what a family of the learned fits does not take itself, it passes on
GIVEN = (  # by the pipeline or by a family, not by the configuration
    *("base", "experts", "out", "rollouts", "trainer", "seed", "progress", "vectors", "references", "score"),
    *("family", "build", "hyper"),
)
SAMPLING = get_type_hints(Sampling, include_extras=True)
Hints = Mapping[str, Any]


def check_keys(cfg: Mapping[str, Any]) -> None:
    """ConfigError that names every unknown key and every impossible value of every group, used by the run or not."""
    if problems := list(_problems(cfg)):
        raise ConfigError("; ".join(problems))


def together(*checks: Callable[[], Any]) -> list[Any]:
    """What each check gives; where some refuse, one error with all that they say: of models or data that are not here
    only if nothing else is at fault."""
    found, refused = [], []
    for check in checks:
        try:
            found.append(check())
        except RotrlError as error:
            refused.append(error)
        except Exception:
            if not refused:  # else what was refused before explains it
                raise
    if len(refused) > 1:
        kind = type(min(refused, key=lambda error: isinstance(error, Absent)))
        raise kind("; ".join(dict.fromkeys(map(str, refused))))
    if refused:
        raise refused[0]
    return found


def _problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    yield from _node("", cfg, config.hints())
    for group in config.GROUPS:
        yield from _node(group, cfg[group], config.hints(group))
    evaluation, evidence = _map(cfg["evaluation"]), _map(cfg["evidence"])
    yield from _node("evaluation.sandbox", evaluation.get("sandbox"), _hints(SANDBOX[0]) | _hints(SANDBOX[1]))
    yield from _node("engine", cfg["engine"], engine_hints() if importlib.util.find_spec("vllm") else {})
    lightning = _hints("pytorch_lightning.trainer.trainer.Trainer") | get_type_hints(
        config.Trainer, include_extras=True
    )
    yield from _node("trainer", cfg["trainer"], lightning)
    for group, kinds in (("models", ("experts", "controls", "prompts")), ("evaluation", ("tasks",))):
        for kind in kinds:
            for name, node in _map(_map(cfg[group]).get(kind)).items():
                yield from _call(f"{group}.{kind}.{name}", node)
    yield from _call("job", cfg["job"])
    for key in ("geometry", "function"):
        yield from _stage(f"evidence.{key}", evidence.get(key))
    yield from _stage("align", cfg["align"])
    for label, node in _map(_map(cfg["align"]).get("controls")).items():
        yield from _stage(f"align.controls.{label}", node)
    merges = {"merge": cfg["merge"]} if "_target_" in _map(cfg["merge"]) else _map(cfg["merge"])
    for label, node in merges.items():
        yield from _samples(f"{label}.gram", _map(_map(node).get("gram")).get("samples"))


def _map(node: Any) -> Mapping[str, Any]:
    return node if isinstance(node, Mapping) else {}


def _node(where: str, node: Any, hints: Hints) -> Iterator[str]:
    """The faults of a map; of a function whose parameters could not be read, none."""
    for key, value in _map(node).items() if hints else ():
        name = f"{where}.{key}".strip(".")
        if key in hints:
            yield from value_faults(name, value, hints[key])
        elif not str(key).startswith("_"):
            yield config.unknown_key(name, list(hints))


def _stage(where: str, node: Any) -> Iterator[str]:
    """A stage's function, and how it has the experts sampled."""
    if node is None:
        return
    if "_target_" not in _map(node):
        yield f"{where} is {node!r}, which is no stage: it has no _target_; choose one by {where}=NAME"
        return
    known = {key: hint for key, hint in _hints(node["_target_"]).items() if key not in GIVEN}
    yield from _target(where, node["_target_"])
    yield from _node(where, node, known and {"samples": Any, "controls": Mapping[str, Any] | None, **known})
    yield from _samples(where, node.get("samples"))


def _samples(where: str, samples: Any) -> Iterator[str]:
    if samples is None:
        return
    if not isinstance(samples, Mapping) or not isinstance(samples.get("sampling"), Mapping) or "n" not in samples:
        yield f"{where}.samples is {samples!r}; give {{n: 2, sampling: {{temperature, top_p, top_k, max_tokens}}}}"
        return
    yield from _node(f"{where}.samples", samples, {"n": Count, "sampling": Any})
    yield from _node(f"{where}.samples.sampling", samples["sampling"], SAMPLING)


def _call(where: str, node: Any) -> Iterator[str]:
    if isinstance(node, Mapping) and "_target_" not in node:
        yield f"{where} is {dict(node)}, a map without _target_; name there the function that gives it"
    elif isinstance(node, Mapping):
        yield from _target(where, node["_target_"])
        yield from _node(where, node, _hints(node["_target_"]))


def _target(where: str, target: Any) -> Iterator[str]:
    if not _hints(str(target)) and str(target).startswith("rotrl."):
        yield f"{where}._target_ is {target!r}, which is nothing of rotrl; see conf/ for what there is"


@cache
def _hints(target: str) -> dict[str, Any]:
    """{parameter: type hint} of a function or class by its source, because importing it may take seconds; {} if not
    found."""
    module, _, name = target.rpartition(".")
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return {}
    stem = Path(spec.origin).parent.joinpath(*inner)
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    body = ast.parse(path.read_text()).body if path.is_file() else []
    found = next((node for node in body if getattr(node, "name", None) == name), None)
    if isinstance(found, ast.ClassDef):
        init = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
        if init is None:  # a dataclass
            named = (node for node in found.body if isinstance(node, ast.AnnAssign))
            return {node.target.id: hint_of(node.annotation) for node in named if isinstance(node.target, ast.Name)}
        found = init
    if not isinstance(found, ast.FunctionDef):
        return {}
    own = {each.arg: hint_of(each.annotation) for each in (*found.args.args, *found.args.kwonlyargs)}
    return own | (_hints(LEARN) if found.args.kwarg and target != LEARN else {})
