"""Families of weights learned on the teachers' logits: rotations, and what shows whether a rotation was needed.

All share one objective, data, start and budget (`learn`) and differ in nothing but what may change.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rotrl.align.deltas import Directions, Free, LowRank
from rotrl.align.family import Family
from rotrl.align.frames import stiefel_family
from rotrl.align.learn import learn
from rotrl.align.low_rank import LowRankTurns
from rotrl.align.parametrization import CayleyTurns
from rotrl.align.sharing import side_of
from rotrl.align.source import Problem
from rotrl.checkpoint.reader import Checkpoint
from rotrl.linalg.tangent import tangent_projection
from rotrl.values import Count, NonNegative, Positive, Sharing, Side, Start


def stiefel(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    *,
    side: Side = "small",
    block: Count | None = None,
    share: Sharing = "none",
    init: Start = "identity",
    anchor: NonNegative = 0.01,
    lr: Positive = 5e-3,
    angle_prior: NonNegative = 3e-3,
    **shared: Any,
) -> dict[str, Any]:
    """Rotates every linear map of the source (see `learn`) on the Stiefel manifold, by Riemannian Adam.

    `angle_prior` weighs `sum ||log R||^2`. `closed_form` is what the Procrustes rotations explain. `side=large` turns
    thin frames (`Frames`).
    """
    turns = {"side": side, "block": block, "share": share}
    hyper = turns | {"init": init, "anchor": anchor, "lr": lr, "angle_prior": angle_prior}
    return learn(base, experts, out, "stiefel", partial(_plain, kind=stiefel_family, **turns), hyper, **shared)


def cayley(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    *,
    side: Side = "small",
    block: Count | None = None,
    share: Sharing = "none",
    anchor: NonNegative = 0.01,
    lr: Positive = 5e-3,
    angle_prior: NonNegative = 3e-3,
    **shared: Any,
) -> dict[str, Any]:
    """The rotations of `stiefel` as Cayley transforms of free skew matrices, by Adam. arXiv 2306.07280 (OFT)."""
    turns = {"side": side, "block": block, "share": share}
    hyper = turns | {"anchor": anchor, "lr": lr, "angle_prior": angle_prior}
    return learn(base, experts, out, "cayley", partial(_plain, kind=CayleyTurns, **turns), hyper, **shared)


def low_rank(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    *,
    seed: int,
    side: Side = "small",
    share: Sharing = "none",
    rank: Count = 4,
    anchor: NonNegative = 0.01,
    lr: Positive = 5e-3,
    angle_prior: NonNegative = 3e-3,
    **shared: Any,
) -> dict[str, Any]:
    """Rotations `exp(A B^T - B A^T)` that turn at most `2 rank` dimensions, by Adam."""
    turns = {"side": side, "share": share, "rank": rank}
    hyper = turns | {"anchor": anchor, "lr": lr, "angle_prior": angle_prior}
    build = partial(_plain, kind=LowRankTurns, **turns, seed=seed)
    return learn(base, experts, out, "low_rank", build, hyper, seed=seed, **shared)


def lora(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    *,
    seed: int,
    rank: Count = 4,
    lr: Positive = 5e-3,
    **shared: Any,
) -> dict[str, Any]:
    """`W + B A` of `rank` for every linear map: the control of rotations with as few parameters."""
    build = partial(_plain, kind=LowRank, rank=rank, seed=seed)
    return learn(base, experts, out, "lora", build, {"rank": rank, "lr": lr}, seed=seed, **shared)


def free(
    base: Checkpoint, experts: dict[str, Checkpoint], out: Path, *, lr: Positive = 2e-4, **shared: Any
) -> dict[str, Any]:
    """Every entry of every linear map learns: distillation without a constraint."""
    return learn(base, experts, out, "free", partial(_plain, kind=Free), {"lr": lr}, **shared)


def coefficients(
    base: Checkpoint, experts: dict[str, Checkpoint], out: Path, *, lr: Positive = 5e-2, **shared: Any
) -> dict[str, Any]:
    """`W + sum_k c_k (W_k - W_base)`: one scalar per expert and matrix, the cheapest learned merge.

    The scalars stand in align.csv, beside what the source holds of each expert already.
    """
    return learn(base, experts, out, "coefficients", _coefficients, {"lr": lr}, **shared)


def split(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    out: Path,
    *,
    side: Literal["small", "left", "right"] = "right",
    lr: Positive = 2e-2,
    **shared: Any,
) -> dict[str, Any]:
    """`W + alpha P_T d + beta (d - P_T d)`, d the sum of the task vectors: two scalars per matrix.

    P_T projects on the first-order rotations of the base's weight (split task arithmetic). Where alpha and beta come
    out alike the rotation is nothing special.
    """
    return learn(base, experts, out, "split", partial(_split, side=side), {"side": side, "lr": lr}, **shared)


# What makes the families of a problem: at the top of the module, where other processes find it by name.


def _plain(problem: Problem, models: Mapping[str, Checkpoint], *, kind: Callable[..., Family], **hyper: Any) -> Family:
    return kind(problem.matrices, **hyper)


def _coefficients(problem: Problem, models: Mapping[str, Checkpoint]) -> Family:
    return Directions(problem.matrices, _task_vectors(problem, models))


def _split(problem: Problem, models: Mapping[str, Checkpoint], *, side: str) -> Family:
    alpha, beta = {}, {}
    vectors = _task_vectors(problem, models)
    for name, matrix in problem.matrices.items():
        d = torch.stack([vector[name] for vector in vectors.values()]).sum(0).double()
        acts = side_of(matrix.shape, side)
        alpha[name] = tangent_projection(models["base"].read(name).double(), d, side=acts)  # type: ignore[arg-type]
        beta[name] = d - alpha[name]
    return Directions(problem.matrices, {"alpha": alpha, "beta": beta})


def _task_vectors(problem: Problem, models: Mapping[str, Checkpoint]) -> dict[str, dict[str, Tensor]]:
    """In float32, by expert and tensor."""
    base = {name: models["base"].read(name).float() for name in problem.matrices}
    experts = {name: model for name, model in models.items() if name != "base"}
    return {name: {key: model.read(key).float() - base[key] for key in base} for name, model in experts.items()}
