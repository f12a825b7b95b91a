"""`regrade=RUN` and `evaluation.completions=FILE`: samples that exist are graded; no engine, no models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rotrl.app import provenance
from rotrl.app.job import bar
from rotrl.app.prepare import PRESENTATION, content_digest, load_tasks
from rotrl.app.run_folder import anchored, done_before, finish, settle
from rotrl.app.stage import digest, source_digest
from rotrl.checkpoint.files import file_sha256
from rotrl.errors import ConfigError
from rotrl.evaluate.completions import Row, read_completions, read_samples
from rotrl.evaluate.published import rule
from rotrl.evaluate.regrade import check, roles_of
from rotrl.evaluate.regrade import regrade as grade
from rotrl.report.record import Record

GRADES = ("evaluation", "protocol", "seed", "regrade", *PRESENTATION)  # what a regrade takes from the command line


@dataclass
class Given:
    """Samples by model, with what the record says of the models; `origin` tells where they come from."""

    samples: dict[str, list[Row]]
    roles: dict[str, str]
    models: dict[str, Any]
    merges: dict[str, Any]
    files: list[Path]
    origin: str

    @property
    def size(self) -> str:
        return f"{sum(map(len, self.samples.values()))} samples of {', '.join(self.samples)}"


def regrade(cfg: dict[str, Any], overrides: list[str], given: Path | None, command: str) -> None:
    """Grades into a run folder of its own. Raises RotrlError before anything is written."""
    console, old = Console(), None
    if cfg["regrade"]:
        old = Record.open(Path(cfg["regrade"])).data
        cfg = as_typed(old["config"], cfg, overrides)
    if cfg["evaluation"] is None:
        raise ConfigError("evaluation is none: samples are graded by the answers of its tasks; choose one")
    if (grader := cfg["protocol"].get("grader")) is not None:
        rule(grader)
    tasks = load_tasks(cfg)
    found = of_run(Path(cfg["regrade"]), old) if old else of_files(cfg, tasks)
    check(found.samples, tasks, cfg["protocol"].get("ks") or ())
    settings = {key: value for key, value in cfg.items() if key not in (*PRESENTATION, "models", "regrade")}
    asked = [content_digest(task) for task in tasks]
    key = digest([settings, [file_sha256(f) for f in found.files], found.roles, asked, source_digest(("evaluate",))])
    if cfg["plan_only"]:
        return console.print(f"{found.origin}\n{found.size}; tasks {', '.join(t.name for t in tasks)}", highlight=False)
    folder = given or Path("outputs") / cfg["name"] / key[:12]
    record = Record(folder / "record.json")
    if done_before(record, key, cfg, console):
        return
    weights = {name: model.get("sha256", "") for name, model in _flat(found.models).items()}
    settle(cfg, key, weights, found.files, folder, record.data)
    console.print(f"run folder {folder}\n{found.origin}", highlight=False, markup=False)
    record.data = provenance.start(cfg, key, found.models, command) | {"merges": found.merges}
    with bar(console, "grade") as progress:
        result = grade(
            found.samples,
            tasks,
            protocol=cfg["protocol"],
            sandbox=cfg["evaluation"]["sandbox"],
            roles=found.roles,
            cache=Path(cfg["cache_dir"]),
            out=folder,
            seed=cfg["seed"],
            margin=cfg["evaluation"]["margin"],
            select=cfg["evaluation"]["select"] or (),
            progress=progress,
        )
    record.data |= {key: result[key] for key in ("scores", "comparisons", "sandbox_level")}
    record.data |= anchored(record.data, cfg)
    record.data["decisions"].append(found.origin)
    record.data["warnings"] += result["alarms"]
    record.data["stages"] = {"grade": {"key": key, "seconds": round(result["seconds"], 3), "reused": False}}
    finish(record, folder, console, cfg["logger"])


def of_run(run: Path, old: Mapping[str, Any]) -> Given:
    models, merges = old.get("models") or {}, old.get("merges") or {}
    scored = list(dict.fromkeys(row["model"] for row in old.get("scores") or []))
    if not scored:
        raise ConfigError(f"{run}: this run has no scores, so no samples; give the folder of a run that evaluated")
    roles = {name: "base" if name == "base" else "merge" if name in merges else "expert" for name in scored}
    samples, files = read_samples(run, scored), sorted((run / "samples").glob("*.jsonl"))
    return Given(samples, roles, dict(models), dict(merges), files, f"Samples of {run}, graded again.")


def of_files(cfg: Mapping[str, Any], tasks: list) -> Given:
    source = cfg["evaluation"]["completions"]
    samples = read_completions(source, tasks)
    roles = roles_of(list(samples), list(cfg["models"].get("experts") or {}))
    files = source if isinstance(source, Mapping) else dict.fromkeys(samples, source)
    facts = {name: {"path": str(files[name]), "sha256": ""} for name in samples}
    models: dict[str, Any] = {"experts": {name: facts[name] for name in samples if roles[name] == "expert"}}
    models |= {"base": facts["base"]} if "base" in facts else {}
    merges = {name: facts[name] for name in samples if roles[name] == "merge"}
    places = list(dict.fromkeys(map(str, files.values())))
    origin = f"Completions from {', '.join(places)}: not generated here."
    return Given(samples, roles, models, merges, [Path(place) for place in places], origin)


def as_typed(old: Mapping[str, Any], cfg: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The configuration of the old run, with what was typed now on top of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = [o.key_or_group.replace("/", ".") for o in OverridesParser.create().parse_overrides(overrides)]
    if idle := [key for key in typed if key.split(".")[0] not in GRADES and not key.startswith("models.known_as")]:
        raise ConfigError(f"regrade grades samples that exist, and {idle[0]} changes none of them; leave it out")
    shown = [key for key in PRESENTATION if key != "name"]
    found = {**old, **{key: cfg[key] for key in (*shown, "regrade")}}
    for key in typed:
        *path, last = key.split(".")
        here, now = found, cfg
        for part in path:
            here[part] = dict(here.get(part) or {})
            here, now = here[part], now[part]
        here[last] = now[last]
    evaluation = found["evaluation"] or {}
    known = {key: cfg["evaluation"][key] for key in ("margin", "select") if cfg["evaluation"]}
    return found | {"evaluation": known | evaluation | {"completions": None} if evaluation else None}


def _flat(models: Mapping[str, Any]) -> dict[str, Any]:
    return {"base": models.get("base") or {}, **(models.get("experts") or {})}
