"""`plan_only=true`: what would be read, computed, written and sampled. Touches nothing."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rotrl.app import descent
from rotrl.app.preflight import preflight
from rotrl.app.prepare import Prepared, check_words, prepare
from rotrl.checkpoint.header import word_of
from rotrl.errors import NoModel


def show_plan(cfg: dict[str, Any], given: Path | None = None) -> None:
    """Prints the plan, or raises what the run would. Hub models that are not here are named; the rest is planned from
    the configuration."""
    from huggingface_hub import constants

    console = Console()
    constants.HF_HUB_OFFLINE = True  # a plan downloads nothing
    try:
        prepared = prepare(cfg)
    except NoModel as missing:
        methods, _ = check_words(cfg)
        console.print(f"[bold]models[/bold]\n  not here yet: {missing}", highlight=False)
        _stages(cfg, list(methods), console)
        _evaluation(cfg, 1 + len(cfg["models"].get("experts") or {}) + len(methods), console)
        return
    preflight(prepared, given or Path("outputs", cfg["name"], "new"))  # named by a digest of all weights, not yet known
    _models(prepared, console)
    _stages(cfg, list(prepared.methods), console)
    _memory(prepared, console)
    _descent(prepared, console)
    _merges(prepared, console)
    _evaluation(cfg, 1 + len(prepared.experts) + len(prepared.methods), console)


def _models(prepared: Prepared, console: Console) -> None:
    from rotrl.checkpoint.layout import role_of

    table = Table("model", "tensors", "matrices", "GB", "dtype", title="models", title_justify="left")
    table.add_column("folder", overflow="fold")
    others = {
        key: model
        for name, pair in prepared.others.items()
        for key, model in zip((f"base of {name}", name), pair, strict=True)
    }
    for name, model in {"base": prepared.base, **prepared.experts, **prepared.controls, **others}.items():
        infos = model.tensors
        size = sum(math.prod(info.shape) * info.dtype.itemsize for info in infos.values())
        matrices = sum(role_of(key, info.shape).is_matrix for key, info in infos.items())
        dtypes = ", ".join(sorted({word_of(info.dtype) for info in infos.values()}))
        table.add_row(name, str(len(infos)), str(matrices), f"{size / 1e9:.3f}", dtypes, str(model.path))
    console.print(table)


def _stages(cfg: Mapping[str, Any], labels: list[str], console: Console) -> None:
    evidence = [key for key in ("lineage", "geometry", "function") if cfg["evidence"].get(key)]
    align = cfg["align"]
    target = align["_target_"].rsplit(".", 1)[-1] if align else "none"
    console.print("[bold]stages[/bold]")
    console.print(f"  evidence  {', '.join(evidence) or 'none'}", highlight=False)
    console.print(f"  align     {target}{_align_details(align)}", highlight=False)
    console.print(f"  merge     {', '.join(labels) or 'none'}", highlight=False)


def _align_details(align: Mapping[str, Any] | None) -> str:
    if align is None:
        return ""
    keys = ("source", "teachers", "side", "steps")
    told = [f"{key} {align[key]}" for key in keys if key in align]
    told += [f"control {label}" for label, own in (align.get("controls") or {}).items() if own is not None]
    return " (" + ", ".join(told) + ")"


def _memory(prepared: Prepared, console: Console) -> None:
    """What a fit holds on its device at most."""
    align, trainer = prepared.cfg["align"], prepared.cfg["trainer"]
    if not align or "steps" not in align:
        return
    from rotrl.align.memory import plan_memory

    planned = plan_memory(prepared.base, prepared.teachers(), list(prepared.experts), align, trainer)
    told = ", ".join(f"{what} {size / 1e9:.3g}" for what, size in planned.items())
    console.print(f"  memory    {sum(planned.values()) / 1e9:.3g} GB at most: {told}", highlight=False)


def _descent(prepared: Prepared, console: Console) -> None:
    """Who descends from whom, told by some of the tensors, where merges would assume otherwise."""
    from rotrl.evidence.lineage import glance

    if not prepared.methods:
        return
    found = glance(prepared.base, prepared.experts)
    looked = f"(by {found['looked']} of {found['tensors']} tensors)"
    console.print(f"  lineage   {found['verdict']} {looked}", highlight=False)
    for text in descent.warnings(found, prepared.methods):
        console.print(f"  warning   {text}", highlight=False, markup=False)
    if (children := descent.parents(found["pairs"])) and not prepared.cfg["models"].get("rebase"):
        told = " and ".join(f"{child} - {parent}" for child, parent in children.items())
        console.print(f"  warning   models.rebase=true takes {told} as task vectors", highlight=False, markup=False)


def _merges(prepared: Prepared, console: Console) -> None:
    from rotrl.merge.plan import plan_merge

    table, total, warnings = Table("merge", "scale", "reads of the inputs", "GB at most"), 0, []
    turned: list[str] = []
    for label, method in prepared.methods.items():
        plan = plan_merge(prepared.base, prepared.experts, method, dtype=prepared.cfg["dtype"])
        total += plan["bytes"]
        turned += [f"{label}: {', '.join(modules)}: {told}" for told, modules in plan["rotations"].items()]
        turned += [f"{label}: {name} by {told}" for name, told in plan["given"].items()]
        warnings += [f"{label}: {text}" for text in plan["warnings"]]
        if plan["precision"] != "float32":
            warnings.append(f"{label}: computed in {plan['precision']}")
        scale = "ignores merge_scale" if plan["scale"] is None else str(plan["scale"])
        table.add_row(label, scale, str(plan["passes"]), f"{plan['bytes'] / 1e9:.3f}")
    if prepared.methods:
        console.print(table)
    for text in turned:
        console.print(f"  rotates   {text}", highlight=False, markup=False)
    if prepared.gram is not None:
        _grams(prepared, prepared.gram, console)
    free = shutil.disk_usage(_existing(Path(prepared.cfg["output"] or "."))).free
    console.print(f"  writes at most {total / 1e9:.3f} GB of {free / 1e9:.0f} GB free", highlight=False)
    for text in warnings:
        console.print(f"  note      {text}", highlight=False, markup=False)


def _grams(prepared: Prepared, gram: Mapping[str, Any], console: Console) -> None:
    from rotrl.checkpoint.grams import planned_sizes

    sizes = sorted(planned_sizes(prepared.base).values(), reverse=True)
    held = gram.get("layers") or len(sizes)
    passes = -(-len(sizes) // held)
    told = f"{len(prepared.experts)} x {sum(sizes) / 1e9:.3f} GB in {prepared.cfg['cache_dir']}/grams"
    held_gb, reads = f"{sum(sizes[:held]) / 1e9:.3f} GB in memory", f"{passes} pass{'es' * (passes > 1)}"
    console.print(f"  Gram matrices {told}, {held_gb}, {reads} over each expert's samples", highlight=False)


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def _sizes(cfg: Mapping[str, Any], console: Console) -> dict[str, int]:
    """Problems of each task; of one that is not here, what its configuration says that it holds."""
    from hydra.utils import instantiate

    from rotrl import config

    sizes = {}
    for name, node in cfg["evaluation"]["tasks"].items():
        try:
            task = instantiate(node)
            sizes[task.name] = len(task.problems)
        except Exception as error:
            reason = config.user_error(error, [])
            if reason is None:
                raise
            console.print(f"  not here yet: {reason}", highlight=False, markup=False)
            counts = [count for key in ("problems", "limit") if (count := node.get(key)) is not None]
            if counts:
                sizes[name] = min(counts)
    return sizes


def _evaluation(cfg: Mapping[str, Any], models: int, console: Console) -> None:
    """Requests, the token budget, and the smallest difference between two models that n samples can show."""
    from rotrl.evaluate.sampling import samples_per_problem
    from rotrl.evaluate.statistics import smallest_visible_difference

    if cfg["evaluation"] is None:
        return
    console.print(f"[bold]evaluation[/bold] of {models} models; difference at power .8, paired by problem")
    protocol = cfg["protocol"]
    table = Table("task", "problems", "n", "requests", "tokens at most", "smallest visible difference")
    for name, problems in _sizes(cfg, console).items():
        n = samples_per_problem(protocol, name)
        requests, visible = problems * n * models, smallest_visible_difference(problems, n)
        tokens = f"{requests * protocol['max_tokens']:,}"
        table.add_row(name, str(problems), str(n), f"{requests:,}", tokens, f"{visible:.3f}")
    console.print(table)
