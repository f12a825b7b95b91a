"""Make the tiny pair again: base, RL experts and SFT controls, with the recipe and what came of it in the manifest.

python -m rotrl +experiment=build_zoo
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from transformers import Qwen2ForCausalLM
from transformers.utils import logging

from rotrl.errors import ConfigError
from rotrl.zoo.measure import accuracy
from rotrl.zoo.model import make_model, make_tokenizer
from rotrl.zoo.tasks import code_task, math_task
from rotrl.zoo.train import freeze_all_but_matrices, grpo, supervised

MANIFEST = "zoo.manifest.json"
METHODS: dict[str, Callable[..., list[float]]] = {"supervised": supervised, "grpo": grpo}


def build(
    out: str | Path,
    *,
    stages: dict[str, dict[str, Any]],
    seed: int = 0,
    problems: int = 300,
    samples: int = 8,
    save_every: int = 40,
    progress: Callable[[str, int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Train every stage into `out/<stage>` and return the manifest.

    The stage `base` starts from random weights and trains all of them; the others start from it and train the matrices
    alone. A stage is `{method: supervised | grpo, families: [math | code, ...], steps, rate, ...}`, the rest being
    keywords of that function. A stage whose recipe and files agree with the manifest is kept, an interrupted one
    continues from its last state in `out/.state`. `progress(stage, step, steps, loss or reward)` replaces the bars.

    Raises ConfigError if there is no stage `base`, a method is unknown or the extra `zoo` is absent.
    """
    check(stages)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = read(folder) or {"checkpoints": {}}
    with calm(), Bars(*columns()) if progress is None else nullcontext() as bars:
        show = progress or Show(bars)
        for name in ["base", *(n for n in stages if n != "base")]:
            recipe = {**stages[name], "seed": seed, "problems": problems, "samples_measured": samples}
            if name != "base":
                recipe["base"] = manifest["checkpoints"]["base"]["files"]["model.safetensors"]
            known = manifest["checkpoints"].get(name, {})
            if known.get("recipe") == recipe and known["files"] == hashes(folder / name):
                continue
            manifest["checkpoints"][name] = make(folder, name, recipe, stages[name], save_every, show)
            write(folder, manifest)
    return manifest


def make(
    folder: Path, name: str, recipe: dict[str, Any], stage: dict[str, Any], save_every: int, show: Callable[..., None]
) -> dict[str, Any]:
    """Train, measure and publish one checkpoint; returns its entry in the manifest."""
    began = time.monotonic()
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    state = folder / ".state" / f"{name}-{key}"
    seed = int(hashlib.sha256(f"{name}/{recipe['seed']}".encode()).hexdigest()[:8], 16) % 2**31
    tokenizer = make_tokenizer()
    if name == "base":
        model = make_model(tokenizer, seed)
    else:
        model = Qwen2ForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        freeze_all_but_matrices(model)
    settings = {k: v for k, v in stage.items() if k != "method"}
    curve = METHODS[stage["method"]](
        model, tokenizer, state, **settings, seed=seed, save_every=save_every, progress=lambda *a: show(name, *a)
    )
    model.eval()
    tasks = {"math": math_task(limit=recipe["problems"]), "code": code_task(limit=recipe["problems"])}
    scores = {f: accuracy(model, tokenizer, t, samples=recipe["samples_measured"]) for f, t in tasks.items()}
    staging = state.parent / f"{name}-{key}.partial"
    model.save_pretrained(staging)
    make_tokenizer().save_pretrained(staging)  # a used one would save the padding of its last call
    for file in staging.iterdir():
        file.chmod(0o644)
    shutil.rmtree(folder / name, ignore_errors=True)
    staging.replace(folder / name)
    shutil.rmtree(state, ignore_errors=True)
    seconds = round(time.monotonic() - began, 1)
    return {
        "recipe": recipe,
        "accuracy": scores,
        "seconds": seconds,
        "files": hashes(folder / name),
        "curve": {"loss" if stage["method"] == "supervised" else "reward": curve},
    }


def check(stages: dict[str, dict[str, Any]]) -> None:
    if "base" not in stages:
        raise ConfigError(f"stages: found {', '.join(stages) or 'none'}, but no 'base' to start from; add it")
    for name, stage in stages.items():
        if stage.get("method") not in METHODS:
            found = stage.get("method")
            raise ConfigError(f"stages.{name}.method: found {found!r}; choose one of {', '.join(METHODS)}")
    if find_spec("trl") is None:
        raise ConfigError("training the tiny pair needs TRL, which is not installed; install the extra: rotrl[zoo]")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint; empty if there is none."""
    files = sorted(p for p in folder.glob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read(folder: Path) -> dict[str, Any] | None:
    file = folder / MANIFEST
    return json.loads(file.read_text()) if file.is_file() else None


def write(folder: Path, manifest: dict[str, Any]) -> None:
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    os.replace(partial, folder / MANIFEST)


@contextmanager
def calm() -> Iterator[None]:
    """One thread, for the matrices are so small that a second one costs more than it brings; no bars but our own."""
    from datasets.utils import logging as datasets_logging

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # it is not used here
            yield
    finally:
        datasets_logging.enable_progress_bar()
        logging.enable_progress_bar()
        torch.set_num_threads(threads)


def columns() -> list[Any]:
    return [
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[value]:.3f}"),
    ]


class Show:
    """One bar a stage, with the loss or the mean reward behind it."""

    def __init__(self, bars: Any) -> None:
        self.bars, self.rows = bars, {}

    def __call__(self, stage: str, step: int, steps: int, value: float) -> None:
        if stage not in self.rows:
            self.rows[stage] = self.bars.add_task(stage, total=steps, value=value)
        self.bars.update(self.rows[stage], completed=step, value=value)
