"""Merges by rotations of the base or of an expert. W is (out, in); a right rotation is W R, a left one R W.

In closed form R_k minimises `|W0 R - W_k|^2 + mu |R - I|^2` (linalg.procrustes), and E_k = W_k - W0 R_k is the residual
that no rotation explains. Solved in float64.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rotrl.checkpoint.rotations import Delta, Rotation
from rotrl.errors import ConfigError
from rotrl.linalg.cayley import cayley, inverse_cayley
from rotrl.linalg.procrustes import polar, procrustes
from rotrl.linalg.rotation import exp, log
from rotrl.linalg.rotation import geodesic as part_of_the_way
from rotrl.linalg.tangent import tangent_projection
from rotrl.merge.linear import task_arithmetic, weighted_sum
from rotrl.merge.sparse import ties
from rotrl.merge.subspace import tsv_m
from rotrl.merge.types import Density, Matrix, NonNegative, Pair, Side


def split_task_arithmetic(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.5,
    side: Side = "right",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """`W0 + scale (alpha P_T d + beta (d - P_T d))` with `d = sum w_i d_i`.

    P_T projects on the first-order rotations of W0. Task arithmetic at alpha = beta; the ablation of every claim about
    rotations.
    """
    d = weighted_sum([expert - base for expert in experts], weights)
    rotation = tangent_projection(base, d, side=side)
    return base + scale * (alpha * rotation + beta * (d - rotation))


def orthomerge(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    residual_scale: float = 0.2,
    residual: Literal["task_arithmetic", "ties", "tsv_m"] = "task_arithmetic",
    density: Density = 0.2,
    variant: Literal["global", "conflict"] = "global",
    side: Side = "right",
    anchor: NonNegative = 0.01,
) -> Tensor:
    """Rotations averaged by their Cayley generators, residuals by `residual`. arXiv 2602.05943.

    `Q_k = (R_k + I)^{-1} (R_k - I)`, `Q = mean|Q_k| sum Q_k / |sum Q_k|`, `W = W0 (I - Q)^{-1} (I + Q) + 0.2 sum E_k`;
    `scale` multiplies Q and the residual. With anchor 0 as published, `R_k = polar(W0^T W_k)`, which on wide matrices
    fills the null space arbitrarily and often reflects: NumericsError. `density` is that of ties. With variant conflict
    R_k turns W0 to W0 plus the rows of d_k (columns, on the left side) whose cosine with the mean row is negative.
    """

    def rotate(w0: Tensor, *ws: Tensor) -> list[Tensor]:
        targets = ws if variant == "global" else _conflicting(w0, ws)
        rotations = [procrustes(w0, w, side="right", anchor=anchor) if anchor else polar(w0.mT @ w) for w in targets]
        generators = [inverse_cayley(r) for r in rotations]
        total = weighted_sum(generators)
        length = torch.stack([q.norm() for q in generators]).mean()
        # Generators that cancel have no mean direction.
        q = total * (length / total.norm()) if total.norm() > 1e-12 * length else torch.zeros_like(total)
        return [w0 @ cayley(scale * q), *(w0 @ r for r in rotations)]

    turned, *explained = on_the_right(rotate, [base, *experts], side, frame=anchor > 0)
    rest = [expert - part for expert, part in zip(experts, explained, strict=True)]
    merge = {"task_arithmetic": task_arithmetic, "ties": ties, "tsv_m": tsv_m}[residual]
    options = {"density": density} if residual == "ties" else {}
    return (turned + merge(torch.zeros_like(turned), rest, scale=scale * residual_scale, **options)).to(base)


def lie_sum(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    weights: Sequence[float] | None = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
) -> Tensor:
    """Sum in the Lie algebra: `W0 exp(scale sum w_k log R_k) + scale residual_scale sum w_k E_k`."""

    def rotate(w0: Tensor, *ws: Tensor) -> list[Tensor]:
        rotations = [procrustes(w0, w, side="right", anchor=anchor) for w in ws]
        generator = weighted_sum([log(r) for r in rotations], weights)
        return [w0 @ exp(scale * generator), *(w0 @ r for r in rotations)]

    turned, *explained = on_the_right(rotate, [base, *experts], side)
    rest = [expert - part for expert, part in zip(experts, explained, strict=True)]
    return (turned + scale * residual_scale * weighted_sum(rest, weights)).to(base)


def geodesic(
    base: Matrix, experts: Pair, *, t: float = 0.5, side: Side = "right", anchor: NonNegative = 0.01
) -> Tensor:
    """From the first expert to the second along their rotation: `W(t) = W_A exp(t log R) + t (W_B - W_A R)`.

    t = 0 is A and t = 1 exactly B: at its ends nothing is merged. R is the closed form from W_A to W_B.
    """

    def rotate(first: Tensor, second: Tensor) -> list[Tensor]:
        r = procrustes(first, second, side="right", anchor=anchor)
        return [first @ part_of_the_way(r, t), first @ r]

    turned, explained = on_the_right(rotate, experts, side)
    return (turned + t * (experts[1] - explained)).to(base)


def geodesic_aligned(
    base: Tensor, experts: Pair, *, source: Tensor, rotation: Rotation | None, t: float = 0.5
) -> Tensor:
    """The geodesic along the alignment of the first expert to the second, `W_A R^t + t (W_B - W_A R)`.

    Where a tensor has no rotation it is the chord.
    """
    first, second = experts
    if not torch.equal(source, first):
        raise ConfigError("the rotations apply to other weights than the first expert's; align with source=<first>")
    r = rotation or Rotation()
    whole = r.apply(first.double())
    return (_power(r, t).apply(first.double()) + t * (second - whole)).to(base)


def learned(
    base: Tensor, experts: Sequence[Tensor], *, source: Tensor, rotation: Rotation | Delta | None, t: float = 1.0
) -> Tensor:
    """On the way to what the align stage learned: `S R^t`, or `S + t delta` where that is no rotation.

    S are the weights that it was learned for, and the whole way is t = 1. The rest is as it is there.
    """
    if rotation is None:
        return source
    if isinstance(rotation, Delta):
        return Delta(t * rotation.delta).apply(source).to(base)
    return (rotation if t == 1 else _power(rotation, t)).apply(source).to(base)


def _power(rotation: Rotation, t: float) -> Rotation:
    """The part t of the way from the identity, in float64."""
    sides = (rotation.left, rotation.right)
    return Rotation(*(None if side is None else part_of_the_way(side.double(), t) for side in sides))


def _conflicting(w0: Tensor, ws: Sequence[Tensor]) -> list[Tensor]:
    vectors = [w - w0 for w in ws]
    mean = weighted_sum(vectors)
    return [w0 + d * ((d * mean).sum(1, keepdim=True) < 0) for d in vectors]


def on_the_right(
    rule: Callable[..., list[Tensor]], matrices: Sequence[Tensor], side: Side, *, frame: bool = True
) -> list[Tensor]:
    """`rule` on float64 matrices of which it rotates the right side; a left rotation is a right one of the transposes.

    No rotation that minimises leaves the joint row space of the matrices, so where that is smaller than the space
    (k, v, down) the rule works on coordinates in it: 4608 instead of 8960 columns for down and two experts.
    """
    if side == "left":
        return [m.mT for m in on_the_right(rule, [m.mT for m in matrices], "right", frame=frame)]
    matrices = [m.double() for m in matrices]
    if not frame or sum(len(m) for m in matrices) >= matrices[0].shape[1]:
        return rule(*matrices)
    rows, _ = torch.linalg.qr(torch.cat(matrices).mT)
    return [m @ rows.mT for m in rule(*(m @ rows for m in matrices))]
