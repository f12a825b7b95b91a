"""Rotations learned on logits by Riemannian Adam: alignment of one expert to another, or a merge of all."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rotrl.align.data import TrainBatches, heldout_batches, load_rollouts, split
from rotrl.align.models import load_models
from rotrl.align.module import LogitAlignment
from rotrl.align.parametrization import Rotations
from rotrl.align.results import write_results
from rotrl.align.source import pose, refuse_reflections
from rotrl.align.trainer import CHECKPOINT, Progress, fit, frozen_dtype, make_trainer, measure, quiet, threads_for
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError, ConfigError

WHERE = ("accelerator", "devices", "enable_progress_bar")  # of the trainer: may change between a run and its resumption


def stiefel(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    *,
    rollouts: dict[str, Path] | None,
    trainer: dict[str, Any],
    seed: int,
    progress: Progress | None = None,
    source: str = "start",
    start: dict[str, Any] | None = None,
    teachers: str | Sequence[str] = "all",
    side: str = "small",
    init: str = "identity",
    anchor: float = 0.01,
    steps: int = 120,
    lr: float = 5e-3,
    warmup: int = 5,
    batch: int = 32,
    prompts: int | None = None,
    max_tokens: int | None = None,
    heldout: float = 0.1,
    angle_prior: float = 3e-3,
    checkpoint_every: int = 20,
) -> dict[str, Any]:
    """Rotates every linear map of the source so that the model speaks like the teachers, each on its own samples.

    Minimises `mean_k KL(teacher_k || rotated) + angle_prior sum ||log R||^2` over the Stiefel manifold: one teacher
    is an alignment, several are multi-teacher distillation, which is a learned merge. Writes rotations.safetensors
    and align.csv into `out`; an interrupted call, made again, continues from `out/align.ckpt`.

    KL is in nats per token on problems held out from the fit: `kl_before` of the source, `kl_after` rotated. Angles
    are in degrees. `explained` and `closed_form` are the shares of |source - mean teacher|^2 that the learned and the
    Procrustes rotations remove. ConfigError for absent or malformed rollouts and when what is resumed was asked for
    differently, NumericsError for gradients that stay NaN.
    """
    asked = {key: value for key, value in locals().items() if key not in ("base", "experts", "out", "progress")}
    began = time.monotonic()
    if init not in ("identity", "procrustes"):
        raise ConfigError(f"align.init={init!r}; one of: identity, procrustes")
    models = {"base": base, **experts}
    problem = pose(base, experts, source=source, start=start, teachers=teachers)
    everything = load_rollouts(problem.teachers, rollouts, max_tokens=max_tokens)
    identity = identify(asked, models)
    resume = resumable(out / CHECKPOINT, identity)
    learn, kept = split(everything, seed=seed, heldout=heldout, prompts=prompts)
    with quiet(), threads_for(problem.matrices):
        engine = make_trainer(trainer, out, steps=steps, checkpoint_every=checkpoint_every, progress=progress)
        closed = problem.closed_form(side=side, anchor=anchor, device=engine.strategy.root_device)
        module = LogitAlignment(
            Rotations(problem.matrices, side=side),
            *load_models(base, problem, frozen_dtype(trainer)),
            train=TrainBatches(learn, batch=batch, steps=steps * engine.accumulate_grad_batches, seed=seed),
            heldout=heldout_batches(kept, batch=batch),
            lr=lr,
            warmup=warmup,
            angle_prior=angle_prior,
            identity=identity,
        )
        before = measure(engine, module)
        if init == "procrustes":
            refuse_reflections(closed)
            module.rotations.assign(closed)
        fit(engine, module, resume)
        after = measure(engine, module)
    names = {"parametrization": "stiefel", "objective": "logits"}
    summary = write_results(out, problem, module.rotations.cpu().export(), models, closed=closed, **names)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return summary | {
        "kl_before": before,
        "kl_after": after,
        "curve": module.curve,
        "seconds": time.monotonic() - began,
    }


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
