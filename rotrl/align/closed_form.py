"""Alignment in closed form: the rotation that brings each matrix of the source nearest to the teacher's."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rotrl.align.data import heldout_batches, load_rollouts
from rotrl.align.frames import stiefel_family
from rotrl.align.models import load_models
from rotrl.align.module import LogitAlignment
from rotrl.align.results import write_results
from rotrl.align.source import pose, refuse_reflections
from rotrl.align.trainer import Progress, frozen_dtype, make_trainer, measure, one_device, quiet, threads_for
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import ConfigError
from rotrl.values import Count, NonNegative, Positive, Sharing


def procrustes(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    *,
    rollouts: dict[str, Path] | None,
    trainer: dict[str, Any],
    seed: int,
    progress: Progress | None = None,
    source: str = "base",
    start: dict[str, Any] | None = None,
    teachers: str | Sequence[str] = "all",
    mix: Mapping[str, Positive] | None = None,
    side: Literal["small", "large", "left", "right"] = "small",
    block: Count | None = None,
    share: Sharing = "none",
    anchor: NonNegative = 0.01,
    max_tokens: Count | None = None,
    batch: Count = 64,
    vectors: dict[str, Checkpoint] | None = None,
) -> dict[str, Any]:
    """`R = argmin |S R - T|` (right) or `|R S - T|` (left) for every linear map S of the source, T the teachers' mean
    by `mix`; `block` and `share` as in the learned rotations.

    `source=math teachers=[code]` aligns math to code. Writes rotations.safetensors and align.csv into `out`; given
    rollouts, `kl_before` and `kl_after` are KL(teacher || source) and KL(teacher || rotated) in nats per token.
    NumericsError where the solution is a reflection.
    """
    began = time.monotonic()
    problem = pose(base, experts, source=source, start=start, teachers=teachers, mix=mix, vectors=vectors)
    family = stiefel_family(problem.matrices, side=side, block=block, share=share)
    found = family.closed_form(problem.terms, anchor=anchor)
    if found is None:
        raise ConfigError("align.side=both: both sides at once have no closed form; use small, large, left or right")
    rotations = family.by_tensor(found)
    refuse_reflections(rotations)
    models = {"base": base, **(vectors or experts)}
    names = ("procrustes", "weights")
    summary = write_results(out, problem, rotations, models, *names, closed=rotations)
    before = after = {}
    if rollouts:
        everything = load_rollouts(problem.teachers, rollouts, max_tokens=max_tokens)
        with quiet(), threads_for(problem.matrices):
            engine = make_trainer(one_device(trainer), out)
            module = LogitAlignment(
                family,
                *load_models(base, problem, frozen_dtype(trainer)),
                heldout=heldout_batches(everything, batch=batch),
            )
            before = measure(engine, module)
            family.assign(found)
            after = measure(engine, module)
    return summary | {
        "kl_before": before,
        "kl_after": after,
        "curve": [],
        "seconds": time.monotonic() - began,
    }
