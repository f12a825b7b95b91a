"""One fit for all families: what the teachers say on their own samples, learned by what a family lets change."""

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from rotrl.align.data import Rollout, TrainBatches, heldout_batches, load_rollouts, split
from rotrl.align.family import Family
from rotrl.align.models import load_models, recompute_layers
from rotrl.align.module import LogitAlignment
from rotrl.align.parametrization import Rotations, Term, Turns
from rotrl.align.ranks import in_ranks, is_rank, leave_at_exit
from rotrl.align.results import write_results
from rotrl.align.source import Problem, pose, refuse_reflections
from rotrl.align.squares import ActivationAlignment, WeightAlignment
from rotrl.align.trainer import CHECKPOINT, Progress, fit, frozen_dtype, make_trainer, measure, quiet, threads_for
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError, ConfigError
from rotrl.values import Count, Objective, Part, Positive, Sharing, Side, Start, Within, faults_of, value_faults

OBJECTIVES: dict[str, type[LogitAlignment]] = {
    "logits": LogitAlignment,
    "activation": ActivationAlignment,
    "weight": WeightAlignment,
}
# Of the trainer: may change between a run and its resumption.
WHERE = ("accelerator", "devices", "strategy", "num_nodes", "enable_progress_bar")
NOT_ASKED = ("base", "experts", "vectors", "out", "build", "hyper")


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
    mix: Mapping[str, Positive] | None = None,
    objective: Objective = "logits",
    steps: Count = 120,
    warmup: Annotated[int, Within(0)] = 5,
    batch: Count = 32,
    prompts: Count | None = None,
    max_tokens: Count | None = None,
    heldout: Part = 0.1,
    patience: Count | None = None,
    validate_every: Count = 20,
    checkpoint_every: Count = 20,
    gradient_checkpointing: bool = False,
    adapter: bool = False,
    adapter_block: Count | None = None,
    vectors: dict[str, Checkpoint] | None = None,
) -> dict[str, Any]:
    """Changes the linear maps of the source within a family so that the model becomes like the teachers.

    Minimises `sum_k mix_k L_k + angle_prior sum ||log R||^2`. With `objective=logits` L_k is KL(teacher_k || adapted)
    on its own samples: one teacher is an alignment, several are multi-teacher distillation, which is a learned merge.
    With `activation` L_k is the distance of what the linear maps give on teacher_k's own inputs, with `weight` that of
    the weights, for which no sample is needed (`squares`). Writes rotations.safetensors or deltas.safetensors and
    align.csv into `out`; an interrupted call, made again, continues from `out/align.ckpt`. Several devices of `trainer`
    share the sequences of every step and end where one does (`ranks`). `patience` ends the fit after so many looks,
    one each `validate_every` steps, without a lower KL, at the lowest. `adapter` adds a PEFT adapter of the source
    (`Family.save_adapter`). `hyper` is what the family was made from, with its lr. `vectors` are the experts as merges
    see them, where they are not themselves.

    KL is in nats per token on problems held out from the fit: `kl_before` of the source, `kl_after` adapted. Angles
    are in degrees. `explained` and `closed_form` are the shares of |source - mean teacher|^2 that the learned weights
    and the Procrustes rotations remove. ConfigError for absent or malformed rollouts and when what is resumed was
    asked for differently, NumericsError for gradients that stay NaN.
    """
    passed = {key: value for key, value in locals().items() if key != "progress"}
    asked = {key: value for key, value in passed.items() if key not in NOT_ASKED} | hyper
    began = time.monotonic()
    check(asked, sampled=bool(rollouts))
    with quiet():
        count = 1 if is_rank() else make_trainer(trainer, out).num_devices
    if is_rank():
        leave_at_exit()
    if count > 1:
        return in_ranks(partial(learn, **passed), count, progress)
    models = {"base": base, **(vectors or experts)}
    problem = pose(base, experts, source=source, start=start, teachers=teachers, mix=mix, vectors=vectors)
    learnt, kept = samples(problem, asked)
    identity = identify(asked, models)
    resume = resumable(out / CHECKPOINT, identity)
    with quiet(), threads_for(problem.matrices):
        engine = make_trainer(trainer, out, steps=steps, checkpoint_every=checkpoint_every, progress=progress)
        device, first = engine.strategy.root_device, engine.is_global_zero
        if device.type == "cuda":
            torch.cuda.set_device(device)
        made = build(problem, models)
        closed = closed_form(made, problem.terms, hyper, engine) if first else None
        solved = made.by_tensor(closed) if isinstance(made, Turns) and closed else None
        student, frozen = load_models(base, problem, frozen_dtype(trainer))
        if gradient_checkpointing:
            recompute_layers(student)
        module = OBJECTIVES[objective](
            made,
            student,
            frozen,
            train=TrainBatches(
                learnt,
                batch=batch,
                steps=steps * engine.accumulate_grad_batches,
                seed=seed,
                rank=engine.global_rank,
                ranks=engine.world_size,
            ),
            heldout=heldout_batches(kept, batch=batch),
            lr=hyper["lr"],
            warmup=warmup,
            angle_prior=hyper.get("angle_prior", 0.0),
            mix=problem.mix,
            patience=patience,
            validate_every=validate_every,
            identity=identity,
        )
        if isinstance(module, WeightAlignment):
            module.aim(problem, learnt, trainer)
        if adapter and first:
            made.save_adapter(out / "adapter", problem.folder, adapter_block)
        before = measure(engine, module)
        if hyper.get("init") == "procrustes" and first:  # DDP gives it to the others
            if isinstance(module, ActivationAlignment):
                closed = closed_form(made, module.terms.__getitem__, hyper, engine)
            if not closed or not isinstance(made, Rotations):
                raise ConfigError("align.init=procrustes: both sides at once have no closed form; use init=identity")
            refuse_reflections(made.by_tensor(closed))
            made.assign(closed)
        fit(engine, module, resume)
        after = measure(engine, module)
    if not first:
        return {}
    result = made.cpu()
    learned, details = result.export(), result.details()
    if adapter:
        result.save_adapter(out / "adapter", problem.folder, adapter_block)
    summary = write_results(out, problem, learned, models, family, objective, closed=solved, details=details)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return summary | {
        "kl_before": before,
        "kl_after": after,
        "curve": module.curve,
        "validations": module.validations,
        "parameters": sum(part.numel() for part in result.parameters()),
        "seconds": time.monotonic() - began,
    }


def closed_form(
    family: Family, terms: Callable[[str], Sequence[Term]], hyper: Mapping[str, Any], engine: Any
) -> list[Tensor] | None:
    """The rotations that minimise the squares of `terms`; None for a family that is none or has no closed form."""
    if not isinstance(family, Turns) or "anchor" not in hyper:
        return None
    return family.closed_form(terms, anchor=hyper["anchor"], device=engine.strategy.root_device)


def check(settings: Mapping[str, Any], *, sampled: bool) -> None:
    """ConfigError for choices that there are not and for those that need samples where there are none, all at once."""
    faults = faults_of(learn, settings, "align")
    for key, hint in {"init": Start, "side": Side, "share": Sharing}.items():
        faults += value_faults(f"align.{key}", settings[key], hint) if key in settings else []
    if not settings.get("samples", True) and settings.get("objective", "weight") != "weight":
        faults.append(f"align.objective={settings['objective']} needs samples of each teacher; give align.samples")
    if settings.get("patience") and not sampled:
        faults.append(
            "align.patience looks at the KL on samples, and there are none; give align.samples or leave it out"
        )
    if faults:
        raise ConfigError("; ".join(faults))


def samples(problem: Problem, asked: Mapping[str, Any]) -> tuple[dict[str, list[Rollout]], dict[str, list[Rollout]]]:
    """Rollouts of every teacher to learn from and to measure on; none if none are given and none are needed."""
    if not asked["rollouts"] and asked["objective"] == "weight":
        return {}, {}
    everything = load_rollouts(problem.teachers, asked["rollouts"], max_tokens=asked["max_tokens"])
    return split(everything, seed=asked["seed"], heldout=asked["heldout"], prompts=asked["prompts"])


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
