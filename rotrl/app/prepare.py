"""Everything that can be wrong with the input is found here, before a byte is written."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rotrl import config
from rotrl.align.source import check_problem
from rotrl.app.check import check_keys, together
from rotrl.app.methods import check_device, check_grams, check_names, check_patterns, methods_of
from rotrl.app.models import open_models, open_others
from rotrl.app.stage import digest, source_digest
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import Absent, ConfigError, EvaluationError, NoData
from rotrl.evaluate.task import Task, custom
from rotrl.merge.bind import bind
from rotrl.merge.check import renamed
from rotrl.merge.given import open_given
from rotrl.merge.method import Method
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
        files = [file_sha256(Path(path)) for method in self.methods.values() for path in method.rotation_files.values()]
        return digest([settings, self.weights, controls, asked, *([files] if files else []), source_digest(PACKAGES)])

    def places(self) -> list[Path]:
        """The folders of the models and the files of rotations that the run reads."""
        others = [model for pair in self.others.values() for model in pair]
        models = [self.base, *self.experts.values(), *self.controls.values(), *others]
        folders = [place for model in models for place in (model.path, model.given, model.tokenizer_folder)]
        return [*folders, *(Path(file) for method in self.methods.values() for file in method.rotation_files.values())]

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
    """Opens the models (headers only), binds the methods, loads the tasks; every fault that can be known is told."""
    (methods, applied), (base, experts, controls), others, tasks = together(
        *(partial(check, cfg) for check in (check_words, open_models, open_others, load_tasks))
    )
    cfg = {**cfg, "align": as_followed(cfg["align"])}
    prepared = Prepared(cfg, base, experts, controls, methods, tasks, applied=applied, others=others)
    *_, prompts = together(
        partial(check_names, experts, methods),
        partial(check_patterns, base, prepared.stack()),
        partial(check_rebase, cfg, experts),
        partial(check_grams, methods),
        partial(check_given, prepared),
        partial(check_align, prepared),
        partial(load_prompts, prepared),
    )
    return replace(prepared, prompts=prompts)


def check_words(cfg: Mapping[str, Any]) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods, once all is right that the configuration alone tells."""
    check_experts(cfg)
    checks = (check_keys, methods_of, check_device, check_known)
    return together(*(partial(check, cfg) for check in checks))[1]


def check_experts(cfg: Mapping[str, Any]) -> None:
    """Without experts a base can only be evaluated."""
    if not cfg["models"].get("experts") and (cfg["merge"] or cfg["align"] or any(cfg["evidence"].values())):
        raise ConfigError(
            "models.experts is empty; give at least one: 'models.experts={math: DIR, code: DIR}', or evaluate the base "
            "alone: evidence=none align=none merge=none"
        )


def check_known(cfg: Mapping[str, Any]) -> None:
    named = ["base", *(cfg["models"].get("experts") or {})]
    if strangers := (cfg["models"].get("known_as") or {}).keys() - set(named):
        raise ConfigError(config.unknown_key(f"models.known_as.{min(strangers)}", named))


def as_followed(align: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The alignment's settings without what counts for nothing: the scale of its start, a default of its own, where
    that has none, and controls that were dropped by null."""
    if not align:
        return align
    found = dict(align)
    if controls := align.get("controls"):
        found["controls"] = {label: control for label, control in controls.items() if control is not None}
    if (start := align.get("start")) and "scale" not in parameters_of(str(start.get("_target_"))):
        found["start"] = {key: value for key, value in start.items() if key != "scale"}
    return found


def check_given(prepared: Prepared) -> None:
    """Files of rotations that a merge is given. Of experts that merges see otherwise the merge itself checks them."""
    derived = prepared.cfg["models"].get("rebase") or prepared.cfg["models"].get("canonicalize")
    for method in prepared.methods.values():
        open_given(method.rotation_files, prepared.base, {} if derived else prepared.experts)


def check_align(prepared: Prepared) -> None:
    """Unknown teachers, a wrong start, and rotations that a merge needs but nothing gives."""
    start = (prepared.cfg["align"] or {}).get("start")
    if start and prepared.cfg["align"].get("source") == "start":
        try:
            method = bind(start, list(prepared.experts))
        except ConfigError as error:
            raise ConfigError(renamed(error, "align.start.")) from error
        if method.gram is not None or method.needs_rotations:
            needs = "rotations" if method.needs_rotations else "Gram matrices of the experts' samples"
            raise ConfigError(
                f"align.start is {method.name}, which needs {needs}; start from a merge of weights alone: "
                "merge@align.start=task_arithmetic"
            )
    if prepared.cfg["align"]:
        asked = {key: prepared.cfg["align"].get(key) for key in ("source", "start", "teachers", "mix")}
        check_problem(list(prepared.experts), **asked)
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

    tasks, problems, wrong = [], [], False
    for node in (cfg["evaluation"] or {"tasks": {}})["tasks"].values():
        try:
            tasks.append(instantiate(node))
        except Exception as error:
            reason = config.user_error(error, [])
            if reason is None:
                raise
            problems.append(reason)
            wrong = wrong or not any(isinstance(cause, Absent) for cause in config.causes(error))
    if problems:
        raise (EvaluationError if wrong else NoData)("; ".join(problems))
    if cfg["evaluation"] and not tasks:
        raise ConfigError("evaluation has no tasks; choose some, or evaluation=none")
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
