"""One fit for all families: what the teachers say on their own samples, learned by what a family lets change."""

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from rotrl.align.data import TrainBatches, heldout_batches, load_rollouts, split
from rotrl.align.family import Family
from rotrl.align.models import load_models
from rotrl.align.module import LogitAlignment
from rotrl.align.parametrization import Rotations
from rotrl.align.results import write_results
from rotrl.align.source import Problem, pose, refuse_reflections
from rotrl.align.trainer import CHECKPOINT, Progress, fit, frozen_dtype, make_trainer, measure, quiet, threads_for
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError, ConfigError

WHERE = ("accelerator", "devices", "enable_progress_bar")  # of the trainer: may change between a run and its resumption


class Build(Protocol):
    """Makes a family from the problem, the base and all experts."""

    def __call__(self, problem: Problem, models: Mapping[str, Checkpoint]) -> Family: ...


def learn(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    family: str,
    build: Build,
    hyper: dict[str, Any],
    *,
    rollouts: dict[str, Path] | None,
    trainer: dict[str, Any],
    seed: int,
    progress: Progress | None = None,
    source: str = "start",
    start: dict[str, Any] | None = None,
    teachers: str | Sequence[str] = "all",
    steps: int = 120,
    warmup: int = 5,
    batch: int = 32,
    prompts: int | None = None,
    max_tokens: int | None = None,
    heldout: float = 0.1,
    checkpoint_every: int = 20,
    adapter: bool = False,
    vectors: dict[str, Checkpoint] | None = None,
) -> dict[str, Any]:
    """Changes the linear maps of the source within a family so that the model speaks like the teachers.

    Minimises `mean_k KL(teacher_k || adapted) + angle_prior sum ||log R||^2`, each teacher on its own samples: one
    teacher is an alignment, several are multi-teacher distillation, which is a learned merge. Writes
    rotations.safetensors or deltas.safetensors and align.csv into `out`; an interrupted call, made again, continues
    from `out/align.ckpt`. `adapter` adds a PEFT adapter of the source. `hyper` is what the family was made from, with
    its lr. `vectors` are the experts as merges see them, where they are not themselves (`pose`).

    KL is in nats per token on problems held out from the fit: `kl_before` of the source, `kl_after` adapted. Angles
    are in degrees. `explained` and `closed_form` are the shares of |source - mean teacher|^2 that the learned weights
    and the Procrustes rotations remove. ConfigError for absent or malformed rollouts and when what is resumed was
    asked for differently, NumericsError for gradients that stay NaN.
    """
    passed = {
        key: value for key, value in locals().items() if key not in ("base", "experts", "vectors", "out", "progress")
    }
    asked = {key: value for key, value in passed.items() if key not in ("build", "hyper")} | hyper
    began = time.monotonic()
    if hyper.get("init", "identity") not in ("identity", "procrustes"):
        raise ConfigError(f"align.init={hyper['init']!r}; one of: identity, procrustes")
    models = {"base": base, **(vectors or experts)}
    problem = pose(base, experts, source=source, start=start, teachers=teachers, vectors=vectors)
    everything = load_rollouts(problem.teachers, rollouts, max_tokens=max_tokens)
    identity = identify(asked, models)
    resume = resumable(out / CHECKPOINT, identity)
    learnt, kept = split(everything, seed=seed, heldout=heldout, prompts=prompts)
    with quiet(), threads_for(problem.matrices):
        engine = make_trainer(trainer, out, steps=steps, checkpoint_every=checkpoint_every, progress=progress)
        closed = None
        if "anchor" in hyper and hyper["side"] != "both":
            device = engine.strategy.root_device
            closed = problem.closed_form(side=hyper["side"], anchor=hyper["anchor"], device=device)
        module = LogitAlignment(
            build(problem, models),
            *load_models(base, problem, frozen_dtype(trainer)),
            train=TrainBatches(learnt, batch=batch, steps=steps * engine.accumulate_grad_batches, seed=seed),
            heldout=heldout_batches(kept, batch=batch),
            lr=hyper["lr"],
            warmup=warmup,
            angle_prior=hyper.get("angle_prior", 0.0),
            identity=identity,
        )
        if adapter:
            module.family.save_adapter(out / "adapter", problem.folder)
        before = measure(engine, module)
        if hyper.get("init") == "procrustes":
            if not closed or not isinstance(module.family, Rotations):
                raise ConfigError("align.init=procrustes: both sides at once have no closed form; use init=identity")
            refuse_reflections(closed)
            module.family.assign(closed)
        fit(engine, module, resume)
        after = measure(engine, module)
    result = module.family.cpu()
    learned, details = result.export(), result.details()
    if adapter:
        result.save_adapter(out / "adapter", problem.folder)
    summary = write_results(out, problem, learned, models, family, "logits", closed=closed, details=details)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return summary | {
        "kl_before": before,
        "kl_after": after,
        "curve": module.curve,
        "parameters": sum(part.numel() for part in result.parameters()),
        "seconds": time.monotonic() - began,
    }


def control_of(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a control: its own family; objective, data, start and budget are those of `settings`."""
    shared = {*inspect.signature(learn).parameters, "_partial_", "_recursive_", "_convert_"}
    return {key: value for key, value in settings.items() if key in shared} | dict(own)


def identify(asked: Mapping[str, Any], models: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Everything that the result follows from, as JSON by key."""
    changed = {
        "rollouts": {name: file_sha256(Path(path)) for name, path in (asked["rollouts"] or {}).items()},
        "trainer": {key: value for key, value in asked["trainer"].items() if key not in WHERE},
        "weights": {name: model.sha256 for name, model in models.items()},
    }
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in {**asked, **changed}.items()}


def resumable(path: Path, identity: Mapping[str, str]) -> Path | None:
    """The checkpoint to continue from. ConfigError names the keys in which it was asked for differently."""
    if not path.exists():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)["rotrl"]["identity"]
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        told = type(error).__name__
        raise CheckpointError(f"{path}: no checkpoint of an alignment ({told}); delete it to start anew") from error
    changed = [key for key in identity if stored.get(key) != identity[key]]
    if changed:
        told = "; ".join(f"{key} was {stored.get(key)}, now {identity[key]}" for key in changed)
        raise ConfigError(
            f"{path}: belongs to another alignment ({told}); set it back or delete the file to start anew"
        )
    return path
