"""Everything that can be wrong with the input is found here, before a byte is written."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rotrl import config
from rotrl.app.models import open_models, open_others
from rotrl.app.stage import digest, source_digest
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.folder import stands_in_a_folder
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate.task import Task, custom
from rotrl.merge.check import pattern_faults
from rotrl.merge.given import open_given
from rotrl.merge.method import Method, bind
from rotrl.merge.signature import parameters_of

# Keys that say where and how a run is shown, not what it computes.
PRESENTATION = (
    "name",
    "run_dir",
    "cache_dir",
    "output",
    "plan_only",
    "overwrite",
    "device",
    "debug",
    "logger",
    "verify",
    "doctor",
)
PACKAGES = ("linalg", "checkpoint", "merge", "align", "evidence", "evaluate")


@dataclass(frozen=True)
class Prepared:
    """The checked input of a run. `prompts` holds what each teacher is sampled on, if alignment needs samples.

    `applied` maps the labels of merges that apply what a control of the alignment learned to the control.
    `vectors` are the experts as merges see them (app.descent), set once the lineage is known. `others` are models of
    other bases, each with its base, for geometry alone.
    """

    cfg: dict[str, Any]
    base: Checkpoint
    experts: dict[str, Checkpoint]
    controls: dict[str, Checkpoint]
    methods: dict[str, Method]
    tasks: list[Task]
    prompts: dict[str, Task] = field(default_factory=dict)
    applied: dict[str, str] = field(default_factory=dict)
    vectors: dict[str, Checkpoint] = field(default_factory=dict)
    others: dict[str, tuple[Checkpoint, Checkpoint]] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, str]:
        return {name: model.sha256 for name, model in {"base": self.base, **self.experts}.items()}

    @property
    def digest(self) -> str:
        """Names the run folder: the same inputs and code give the same folder, whatever the paths are."""
        settings = {key: value for key, value in self.cfg.items() if key not in (*PRESENTATION, "models")}
        controls = {name: model.sha256 for name, model in self.controls.items()}
        controls |= {name: [model.sha256 for model in pair] for name, pair in self.others.items()}
        settings |= {key: self.cfg["models"].get(key) for key in ("rebase", "canonicalize")}
        asked = [content_digest(task) for task in (*self.tasks, *self.prompts.values())]
        files = [file_sha256(Path(path)) for method in self.stack() for path in method.rotation_files.values()]
        return digest([settings, self.weights, controls, asked, *([files] if files else []), source_digest(PACKAGES)])

    def stack(self) -> list[Method]:
        """Every method, and those that others work on."""
        return [under for method in self.methods.values() for under in (method, method.of) if under is not None]

    def teachers(self) -> list[str]:
        """The experts that alignment samples from and distils."""
        if self.cfg["align"] is None:
            return []
        chosen = self.cfg["align"].get("teachers", "all")
        return list(self.experts) if chosen == "all" else [chosen] if isinstance(chosen, str) else list(chosen)

    @property
    def samples(self) -> dict[str, Any] | None:
        """How experts are sampled, where alignment, the evidence's function or a merge needs it; all read the same."""
        function = self.cfg["evidence"].get("function") or {}
        gram = self.gram or {}
        return (self.cfg["align"] or {}).get("samples") or function.get("samples") or gram.get("samples")

    def sampled(self) -> list[str]:
        """The experts that are sampled: the teachers, or all for the evidence's function and for Gram matrices."""
        whole = self.cfg["evidence"].get("function") or self.gram is not None
        return list(self.experts) if whole else self.teachers()

    @property
    def gram(self) -> dict[str, Any] | None:
        """How Gram matrices are gathered for the merges that need them; None if none does."""
        return next((method.gram for method in self.methods.values() if method.gram is not None), None)


def content_digest(task: Task) -> str:
    """sha256 over every prompt, answer and test: an edited file of problems is another run, whatever its path."""
    state = hashlib.sha256(f"{task.name} {task.grader}".encode())
    for problem in task.problems:
        state.update(repr(problem).encode())
    return state.hexdigest()


def prepare(cfg: dict[str, Any]) -> Prepared:
    """Opens the models (headers only), binds the methods, loads the tasks; every fault of a kind is raised at once."""
    cfg = {**cfg, "align": with_start(cfg["align"])}
    check_experts(cfg)
    methods, applied = methods_of(cfg)
    base, experts, controls = open_models(cfg)
    check_names(experts, methods)
    known = cfg["models"].get("known_as") or {}
    if strangers := known.keys() - {"base", *experts}:
        raise ConfigError(config.unknown_key(f"models.known_as.{min(strangers)}", ["base", *experts]))
    check_rebase(cfg, experts)
    check_grams(methods)
    others = open_others(cfg)
    prepared = Prepared(cfg, base, experts, controls, methods, load_tasks(cfg), applied=applied, others=others)
    check_patterns(base, prepared.stack())
    check_given(prepared)
    check_align(prepared)
    return replace(prepared, prompts=load_prompts(prepared))


def check_experts(cfg: Mapping[str, Any]) -> None:
    """Without experts a base can only be evaluated."""
    if not cfg["models"].get("experts") and (cfg["merge"] or cfg["align"] or any(cfg["evidence"].values())):
        raise ConfigError(
            "models.experts is empty; give at least one: 'models.experts={math: DIR, code: DIR}', or evaluate the base "
            "alone: evidence=none align=none merge=none"
        )


def with_start(align: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The alignment's settings. The scale of its start, a default of its own, is left out where that has none."""
    if not align or not align.get("start") or "scale" in parameters_of(str(align["start"].get("_target_"))):
        return align
    return {**align, "start": {key: value for key, value in align["start"].items() if key != "scale"}}


def methods_of(cfg: Mapping[str, Any]) -> tuple[dict[str, Method], dict[str, str]]:
    """The merges by label, and the control that is applied by those that apply one.

    In a suite every merge that can apply deltas stands a second time for each control of the alignment: beside
    `learned` there is `learned_lora`.
    """
    methods = bind_methods(cfg["merge"], list(cfg["models"].get("experts") or {}))
    controls = (cfg["align"] or {}).get("controls") or {}
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
            problems.append(str(error).replace("merge.", f"merge.{label}."))
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


def check_given(prepared: Prepared) -> None:
    """Files of rotations that a merge is given. Of experts that merges see otherwise the merge itself checks them."""
    derived = prepared.cfg["models"].get("rebase") or prepared.cfg["models"].get("canonicalize")
    for method in prepared.stack():
        open_given(method.rotation_files, prepared.base, {} if derived else prepared.experts)


def check_evidence(prepared: Prepared) -> None:
    """Settings that a stage of the evidence would refuse are found now, not after hours. Imports the stages."""
    from importlib import import_module

    from hydra.utils import instantiate

    for name in ("geometry", "function"):
        if chosen := prepared.cfg["evidence"].get(name):
            stage = instantiate({k: v for k, v in chosen.items() if k not in ("samples", "others")}, _convert_="all")
            given = inspect.signature(stage.func).bind_partial(**stage.keywords)
            given.apply_defaults()
            import_module(stage.func.__module__).check(given.arguments)


def check_fit(prepared: Prepared) -> None:
    """Choices of the alignment or its trainer that there are not, and a family that can't be built in the shapes of the
    models, are found now. Imports the stage."""
    align = prepared.cfg["align"]
    if not align:
        return
    from rotrl.align.learn import check
    from rotrl.align.memory import paper_family
    from rotrl.align.trainer import check_settings

    check(align, sampled=bool(align.get("samples")))
    check_settings(prepared.cfg["trainer"])
    if "steps" in align:
        paper_family(prepared.base, list(prepared.experts), align)


def check_evaluation(prepared: Prepared) -> None:
    """What can't be asked of all models alike, or not by the protocol, or of no engine, is found now. Imports
    transformers."""
    if not (prepared.tasks or prepared.prompts):
        return
    from rotrl.evaluate import engine_settings, rollouts, run

    engine, samples = prepared.cfg["engine"], prepared.samples or {}
    engine_settings.check_settings(engine)
    if not stands_in_a_folder(prepared.base):
        return
    opened = {"base": prepared.base, **prepared.experts}
    models = {name: model.path for name, model in opened.items() if stands_in_a_folder(model)}
    if prompts := {name: task for name, task in prepared.prompts.items() if name in models}:
        asked = {"n": samples["n"], "sampling": samples["sampling"], "engine": engine, "base": prepared.base.path}
        rollouts.prepare(models, prompts, **asked)
    if prepared.tasks:
        roles = {name: "base" if name == "base" else "expert" for name in models}
        run.check(models, prepared.tasks, protocol=prepared.cfg["protocol"], engine=engine, roles=roles)


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


def check_align(prepared: Prepared) -> None:
    """Unknown teachers, a wrong start, and rotations that a merge needs but nothing gives."""
    start = (prepared.cfg["align"] or {}).get("start")
    if start and prepared.cfg["align"].get("source") == "start":
        try:
            method = bind(start, list(prepared.experts))
        except ConfigError as error:
            raise ConfigError(str(error).replace("merge.", "align.start.")) from error
        if method.gram is not None or method.needs_rotations:
            needs = "rotations" if method.needs_rotations else "Gram matrices of the experts' samples"
            raise ConfigError(
                f"align.start is {method.name}, which needs {needs}; start from a merge of weights alone: "
                "merge@align.start=task_arithmetic"
            )
    if unknown := [name for name in prepared.teachers() if name not in prepared.experts]:
        raise ConfigError(f"align.teachers: no expert {unknown[0]!r}; one of: {', '.join(prepared.experts)}")
    waiting = [label for label, method in prepared.methods.items() if method.needs_rotations]
    if waiting and prepared.cfg["align"] is None:
        raise ConfigError(
            f"merge {waiting[0]!r} applies rotations and align is none; choose align=stiefel or procrustes"
        )
    first = next(iter(prepared.experts), None)
    for label, method in prepared.methods.items():
        if method.name == "geodesic_aligned" and prepared.cfg["align"]["source"] != first:
            raise ConfigError(f"merge {label!r} starts at the first expert; choose align.source={first}")


def check_rebase(cfg: Mapping[str, Any], experts: Mapping[str, Checkpoint]) -> None:
    """ConfigError for a models.rebase that can't be followed."""
    rebased = cfg["models"].get("rebase")
    if rebased is True and not cfg["evidence"].get("lineage"):
        raise ConfigError(
            "models.rebase=true asks the lineage who descends from whom, and there is none; choose evidence=lineage or "
            "name them: 'models.rebase={CHILD: PARENT}'"
        )
    if rebased in (None, True, False):
        return
    if not isinstance(rebased, Mapping):
        raise ConfigError(f"models.rebase is {rebased!r}; true, false or {{CHILD: PARENT}} is expected")
    for name in (*rebased, *rebased.values()):
        if name not in experts:
            raise ConfigError(f"models.rebase: no expert {name!r}; one of: {', '.join(experts)}")
    if loops := [child for child, parent in rebased.items() if child == parent or rebased.get(parent) == child]:
        raise ConfigError(f"models.rebase: {loops[0]!r} can't descend from itself; name the parent of each child once")


def load_tasks(cfg: Mapping[str, Any]) -> list[Task]:
    from hydra.utils import instantiate

    tasks, problems = [], []
    for node in (cfg["evaluation"] or {"tasks": {}})["tasks"].values():
        try:
            tasks.append(instantiate(node))
        except Exception as error:
            reason = config.user_error(error, [])
            if reason is None:
                raise
            problems.append(reason)
    if problems:
        raise EvaluationError("; ".join(problems))
    names, select = [task.name for task in tasks], (cfg["evaluation"] or {}).get("select") or []
    if select and (set(select) - set(names) or set(select) == set(names)):
        raise ConfigError(
            f"evaluation.select is {list(select)}; name some of {', '.join(names)} to choose by, leave some to report"
        )
    return tasks


def load_prompts(prepared: Prepared) -> dict[str, Task]:
    """The training prompts of each expert that is sampled."""
    from hydra.utils import instantiate

    if not prepared.samples:
        if prepared.gram is not None:
            raise ConfigError(
                "merge.gram.samples is not set: how the experts are sampled for Gram matrices, "
                "as in conf/merge/regmean.yaml"
            )
        return {}
    given = prepared.cfg["models"].get("prompts") or {}
    prompts = {}
    for name in prepared.sampled():
        if name not in given:
            raise ConfigError(f"models.prompts.{name} is not set: {name!r} is sampled on it (a jsonl or a task)")
        node = given[name]
        prompts[name] = custom(node) if isinstance(node, str) else instantiate(node)
    return prompts
