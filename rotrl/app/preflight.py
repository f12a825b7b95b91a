"""What each stage would refuse, asked of all of them before the first begins."""

import inspect
import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

from hydra.utils import instantiate

from rotrl.app.check import together
from rotrl.app.prepare import Prepared
from rotrl.app.run_folder import goes_aside
from rotrl.checkpoint.folder import stands_in_a_folder
from rotrl.checkpoint.reader import Checkpoint, open_checkpoint
from rotrl.checkpoint.writer import MANIFEST, valid_manifest
from rotrl.errors import CheckpointError, ConfigError
from rotrl.merge.target import check_space, check_target
from rotrl.report.record import Record


def preflight(prepared: Prepared, folder: Path) -> None:
    """Raises one error with all that evidence, align, merge and evaluate would refuse of a run in `folder`."""
    together(
        partial(check_evidence, prepared),
        partial(check_fit, prepared),
        partial(check_evaluation, prepared),
        partial(check_places, prepared, folder),
        partial(check_outputs, prepared, folder),
    )


def target_of(prepared: Prepared, folder: Path, label: str) -> Path:
    root = Path(prepared.cfg["output"]) if prepared.cfg["output"] else folder / "merged"
    return root if len(prepared.methods) == 1 else root / label


def check_manifests(prepared: Prepared) -> None:
    """Merges of rotrl that came as models and no longer hold what was written. Reads every weight of theirs."""
    faults = []
    for name, model in {"base": prepared.base, **prepared.experts, **prepared.controls}.items():
        if (manifest := valid_manifest(model.path)) is None:
            continue
        stored = open_checkpoint(model.path)
        same = stored.tensors == model.tensors and not model.derived
        if (model if same else stored).sha256 != manifest.get("weights_sha256"):
            faults.append(f"{name}: {model.path}: the weights are not those of {MANIFEST}; make the merge again")
    if faults:
        raise CheckpointError("; ".join(faults))


def check_evidence(prepared: Prepared) -> None:
    """Settings that a stage of the evidence would refuse. Imports the stages."""
    for name in ("geometry", "function"):
        if chosen := prepared.cfg["evidence"].get(name):
            stage = instantiate({k: v for k, v in chosen.items() if k not in ("samples", "others")}, _convert_="all")
            given = inspect.signature(stage.func).bind_partial(**stage.keywords)
            given.apply_defaults()
            import_module(stage.func.__module__).check(given.arguments)


def check_fit(prepared: Prepared) -> None:
    """Choices of the alignment that there are not, families that can't be built in the shapes of the models, and what
    Lightning's Trainer refuses."""
    align = prepared.cfg["align"]
    if not align:
        return
    from rotrl.align.learn import check, control_of
    from rotrl.align.memory import paper_family
    from rotrl.align.trainer import make_trainer, quiet

    check(align, sampled=bool(align.get("samples")))
    for fitted in (align, *(control_of(align, own) for own in (align.get("controls") or {}).values())):
        paper_family(prepared.base, list(prepared.experts), fitted)
    with quiet():
        make_trainer(prepared.cfg["trainer"], Path())


def check_evaluation(prepared: Prepared) -> None:
    """What can't be asked of all models alike, or not by the protocol, or of no engine. Imports transformers."""
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
        wanted, _ = rollouts.prepare(models, prompts, **asked)
        cut = (prepared.cfg["align"] or {}).get("max_tokens") or 0
        for name, asked_of in wanted.items() if cut else ():
            if (least := min(len(each.prompt.ids) for each in asked_of)) >= cut:
                raise ConfigError(
                    f"align.max_tokens={cut} leaves no answer: prompts of {name} have {least} tokens or more"
                )
    if prepared.tasks:
        roles = {name: "base" if name == "base" else "expert" for name in models}
        run.check(models, prepared.tasks, protocol=prepared.cfg["protocol"], engine=engine, roles=roles)


def check_places(prepared: Prepared, folder: Path) -> None:
    """ConfigError for places that can't be written, and for those within a model's folder."""
    cfg = prepared.cfg
    places = {"run_dir": folder, "cache_dir": cfg["cache_dir"], "output": cfg["output"]}
    models = [prepared.base, *prepared.experts.values(), *prepared.controls.values()]
    faults = [fault for key, place in places.items() if place for fault in _place_faults(key, Path(place), models)]
    if (log := cfg["engine"].get("log")) and Path(log).is_dir():
        faults.append(f"engine.log={log} is a folder; give a file")
    if faults:
        raise ConfigError("; ".join(faults))


def _place_faults(key: str, place: Path, models: list[Checkpoint]) -> Iterator[str]:
    here = place.absolute()
    there = next(path for path in (here, *here.parents) if path.exists())
    if not there.is_dir():
        yield f"{key}={place}: {there} is a file; give a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{key}={place}: {there} can't be written; choose another {key}"
    for model in models:
        if model.path.resolve() in (here.resolve(), *here.resolve().parents):
            yield f"{key}={place} lies in the folder of the model {model.path}; choose another {key}"
            return


def check_outputs(prepared: Prepared, folder: Path) -> None:
    """Refuses outputs that no merge may take, and merges that the disk has no room for."""
    from rotrl.merge.plan import plan_merge

    cfg, needed, target = prepared.cfg, 0, folder
    models = [prepared.base, *prepared.experts.values()]
    told = {"dtype": cfg["dtype"], "rounding": cfg["rounding"]}
    old = Record(folder / "record.json").data
    aside = bool(old) and goes_aside(folder, cfg, prepared.digest, old)  # the digest reads every weight: ask it last
    for label, method in prepared.methods.items():
        target = target_of(prepared, folder, label)
        inputs = {**told, "merge": method.config}
        free = aside and target.resolve().is_relative_to(folder.resolve())  # what is there moves with the folder
        if free or check_target(target, models, inputs, overwrite=cfg["overwrite"]) is None:
            needed += plan_merge(prepared.base, prepared.experts, method, dtype=cfg["dtype"])["bytes"]
    check_space(target, needed)
