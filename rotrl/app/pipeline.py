"""The stages in order. Each reads the files of those before it and ends in files of its own."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from rich.console import Console

from rotrl.align.ranks import slurm_tasks
from rotrl.app import descent, provenance
from rotrl.app.accuracy import accuracy_of
from rotrl.app.job import Run
from rotrl.app.preflight import check_manifests, preflight, target_of
from rotrl.app.prepare import Prepared, prepare
from rotrl.app.run_folder import anchored, done_before, finish, settle
from rotrl.app.samples import free_gpu, grams, rollouts
from rotrl.app.stage import Stages, digest
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.folder import on_disk
from rotrl.errors import ConfigError
from rotrl.memory import free_gpu_memory
from rotrl.merge.given import from_samples
from rotrl.report.card import write_cards
from rotrl.report.record import Record


def run(cfg: dict[str, Any], given: Path | None, command: str) -> dict[str, Any]:
    """Runs or continues a run; gives its record. Raises RotrlError on bad input before anything is written."""
    console = Console()
    if (tasks := slurm_tasks()) > 1:
        raise ConfigError(
            f"{tasks} Slurm tasks would run every stage {tasks} times; start one (hydra.launcher.tasks_per_node=1): it "
            "shares a fit among its devices by trainer.devices"
        )
    prepared = prepare(cfg)
    folder = given or Path("outputs") / cfg["name"] / prepared.digest[:12]
    record = Record(folder / "record.json")
    if done_before(record, prepared.digest, cfg, console):
        return record.data
    preflight(prepared, folder)
    check_manifests(prepared)
    settle(cfg, prepared.digest, prepared.weights, prepared.places(), folder, record.data)
    one_thread_for_small_matrices(prepared)
    stages = Stages(Path(cfg["cache_dir"]), folder, lambda text: console.print(text, highlight=False))
    console.print(f"run folder {folder}", highlight=False)
    record.data = provenance.start(cfg, prepared.digest, provenance.models(prepared), command)
    record.save()
    job = Run(prepared, folder, record, stages, console)
    try:
        job.prepared = as_folders(prepared)
        evidence(job)
        align(job)
        merge(job)
        evaluate(job)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        record.data |= {
            "status": "interrupted" if interrupted else "failed",
            "error": str(error),
            "stages": stages.done,
        }
        record.save()
        raise
    record.data["stages"] = stages.done
    finish(record, folder, console, cfg["logger"])
    return record.data


def as_folders(prepared: Prepared) -> Prepared:
    """Adapters and padded models as folders, where a stage loads models by their folder."""
    cfg, cache = prepared.cfg, Path(prepared.cfg["cache_dir"])
    if not (cfg["evaluation"] or cfg["align"] or cfg["evidence"].get("function") or prepared.gram):
        return prepared
    experts = {name: on_disk(model, cache) for name, model in prepared.experts.items()}
    return replace(prepared, base=on_disk(prepared.base, cache), experts=experts)


def one_thread_for_small_matrices(prepared: Prepared) -> None:
    """Threads that share a matrix of a few hundred rows wait for each other: on a busy machine, minutes for seconds."""
    import torch

    widest = max(max(info.shape[-2:]) for info in prepared.base.tensors.values() if len(info.shape) > 1)
    if widest < 1024:
        torch.set_num_threads(1)


def evidence(job: Run) -> None:
    """Lineage and geometry: what the weights alone say; function: what parts of the updates do."""
    settings, models = job.cfg["evidence"], job.prepared
    packages = ("linalg", "checkpoint", "evidence")
    if settings.get("lineage"):
        from rotrl.evidence.lineage import lineage

        def find_lineage(out: Path) -> dict[str, Any]:
            with job.bar("lineage") as progress:
                return lineage(models.base, models.experts, out / "evidence", progress=progress)

        job.record.data["lineage"] = job.stages.run("lineage", models.weights, packages, find_lineage)
    if settings.get("geometry"):
        tuned = {**models.experts, **models.controls}
        asked = {key: value for key, value in settings["geometry"].items() if key != "others"}
        inputs = [asked, models.weights, {n: m.sha256 for n, m in tuned.items()}, job.cfg["seed"]]
        inputs += [{n: [m.sha256 for m in pair] for n, pair in models.others.items()}] if models.others else []

        def measure(out: Path) -> dict[str, Any]:
            with job.bar("geometry") as progress:
                stage = instantiate(asked, _convert_="all")
                shared = {"references": list(models.controls), "others": models.others, "seed": job.cfg["seed"]}
                return stage(models.base, tuned, out / "evidence", progress=progress, **shared)

        job.record.data["geometry"] = job.stages.run("geometry", inputs, packages, measure)
    if settings.get("function"):
        files = rollouts(job) or {}
        chosen = {key: value for key, value in settings["function"].items() if key != "samples"}
        inputs = [chosen, models.weights, {n: file_sha256(f) for n, f in files.items()}, job.cfg["seed"]]
        if chosen.get("accuracy"):
            inputs += [job.cfg["protocol"], job.cfg["engine"]]

        def test(out: Path) -> dict[str, Any]:
            with job.bar("function") as progress:
                stage = instantiate(chosen, _convert_="all")
                shared = {"rollouts": files, "seed": job.cfg["seed"], "progress": progress}
                scored = {"score": partial(accuracy_of, models, job.cfg)} if chosen.get("accuracy") else {}
                summary = stage(models.base, models.experts, out / "evidence", **shared, **scored)
            free_gpu()
            return summary

        job.record.data["function"] = job.stages.run("function", inputs, (*packages, "align"), test)
    found = job.record.data.get("lineage") or {}
    job.prepared, notes = descent.settled(models, found)
    job.record.data["warnings"] += notes
    if not job.cfg["models"].get("rebase"):
        job.record.data["warnings"] += descent.warnings(found, models.methods)


def align(job: Run) -> None:
    """Rotations that align models to each other, closed form or learned, and the controls that learned otherwise."""
    settings = job.cfg["align"]
    if settings is None:
        return
    from rotrl.align.learn import control_of

    files = rollouts(job)
    own = {key: value for key, value in settings.items() if key not in ("samples", "controls")}
    summary = job.record.data["align"] = fit(job, own, files, "align")
    controls = settings.get("controls") or {}
    summary["controls"] = {
        label: fit(job, control_of(own, control), files, f"align-{label}", Path("controls", label))
        for label, control in controls.items()
    }


def fit(
    job: Run, settings: dict[str, Any], files: dict[str, Path] | None, name: str, folder: Path = Path()
) -> dict[str, Any]:
    """One alignment as a stage; its files appear in `folder` of the run folder."""
    models, shared = job.prepared, {"trainer": job.cfg["trainer"], "seed": job.cfg["seed"]}
    inputs = [settings, *shared.values(), models.weights, {n: vector.sha256 for n, vector in models.vectors.items()}]
    shared["vectors"] = models.vectors
    inputs.append({name: file_sha256(path) for name, path in (files or {}).items()})

    def produce(out: Path) -> dict[str, Any]:
        free_gpu_memory()  # the models of another fit
        with job.bar(name) as progress:
            stage = instantiate(settings, _convert_="all")
            return stage(models.base, models.experts, out / folder, rollouts=files, progress=progress, **shared)

    return job.stages.run(name, inputs, ("linalg", "checkpoint", "merge", "align"), produce)


def merge(job: Run) -> None:
    """Every merge of the suite, each to a checkpoint of its own, kept where its fingerprint still holds."""
    from rotrl.align.results import ROTATIONS, learned_file
    from rotrl.merge.engine import merge as write_merge

    gathered = grams(job)
    models = job.prepared
    merges = job.record.data.setdefault("merges", {})
    for label, method in models.methods.items():
        target = target_of(models, job.folder, label)
        control = models.applied.get(label)
        learned = learned_file(job.folder / "controls" / control if control else job.folder)
        with job.bar(f"merge {label}") as progress:
            result = write_merge(
                models.base,
                models.vectors,
                method,
                target,
                dtype=job.cfg["dtype"],
                rounding=job.cfg["rounding"],
                device=job.cfg["device"],
                rotations=learned,
                grams=gathered,
                overwrite=job.cfg["overwrite"],
                progress=progress,
            )
        merges[label] = {**result, "path": str(target), "config": method.config}
        if method.needs_rotations:
            merges[label] |= {"rotates": learned is not None and learned.name == ROTATIONS, "control": control}
        if method.rotation_files:
            merges[label] |= {"sampled": from_samples(method.rotation_files)}
        job.stages.record(f"merge/{label}", result["fingerprint"], result["seconds"], reused=result["reused"])
        job.record.data["warnings"] += [f"{label}: {text}" for text in result["warnings"]]
        job.record.save()


def evaluate(job: Run) -> None:
    """Base, experts and merges on equal terms: one engine, the same prompts, paired comparisons."""
    if not job.prepared.tasks:
        return
    from rotrl.evaluate.run import evaluate as score

    models, merges = job.prepared, job.record.data.get("merges", {})
    experts = dict.fromkeys(models.experts, "expert")
    with job.bar("evaluate") as progress:
        result = score(
            {
                "base": models.base.path,
                **{name: model.path for name, model in models.experts.items()},
                **{label: Path(made["path"]) for label, made in merges.items()},
            },
            models.tasks,
            protocol=job.cfg["protocol"],
            engine=job.cfg["engine"],
            sandbox=job.cfg["evaluation"]["sandbox"],
            roles={"base": "base", **experts, **dict.fromkeys(merges, "merge")},
            weights={**models.weights, **{label: made["sha256"] for label, made in merges.items()}},
            cache=job.cache,
            out=job.folder,
            seed=job.cfg["seed"],
            margin=job.cfg["evaluation"]["margin"],
            select=job.cfg["evaluation"]["select"] or (),
            progress=progress,
        )
    data = job.record.data
    data |= {key: result[key] for key in ("scores", "comparisons", "sandbox_level", "prompt_sha256")}
    data |= anchored(data, job.cfg)
    data["warnings"] += result["alarms"]
    write_cards(data, job.folder)
    key = digest([models.weights, merges, job.cfg["protocol"]])
    job.stages.record("evaluate", key, result["seconds"], reused=result["generated"] == 0)
    data["stages"] = job.stages.done
    data["stages"]["evaluate"] |= {k: result[k] for k in ("generated", "reused", "tokens_per_second")}
    job.log(f"evaluate: {result['generated']} samples generated, {result['reused']} reused")
