"""Merges by rotations of the base or of an expert. W is (out, in); a right rotation is W R, a left one R W.

R_k minimises `|W0 R - W_k|^2 + mu |R - I|^2` (linalg.small) or is given, and E_k = W_k - W0 R_k is the residual that
this rotation does not explain. A left rotation is a right one of the transposed matrices.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Annotated, Literal

import torch
from torch import Tensor

from rotrl.checkpoint.rotations import SIDES, Delta, Rotation
from rotrl.errors import ConfigError
from rotrl.linalg.small import exact_turns, given_turns, turns
from rotrl.linalg.tangent import tangent_projection
from rotrl.linalg.turns import Turn, Turns
from rotrl.merge.linear import weighted_sum
from rotrl.merge.sparse import ties
from rotrl.merge.subspace import tsv_m
from rotrl.merge.types import Density, Equivariant, NonNegative, Pair, Rows, Side, Unless

Given = Sequence[Rotation | None] | None
"""Rotations of the base towards each expert, in place of those in closed form; None stands for the identity."""


def split_task_arithmetic(
    base: Equivariant,
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
    base: Annotated[Equivariant, Unless((("residual", "ties"), ("variant", "conflict")))],
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

    def merged(w0: Tensor, *ws: Tensor) -> Tensor:
        vectors = [w - w0 for w in ws]
        updates = vectors if variant == "global" else _conflicting(vectors)
        found = turns(w0, updates, anchor=anchor) if anchor else exact_turns(w0, updates, anchor=0.0, published=True)
        lengths = torch.stack([found.length(q) for q in found.generators])
        total = found.combined(found.generators)
        mean, length = lengths.mean(0), found.length(total)
        # Generators that cancel have no mean direction.
        direction = torch.where(length > 1e-12 * mean, mean / length, 0.0)
        rotated = found.cayley(total._replace(theta=scale * direction * total.theta))
        explained = [found.cayley(q) for q in found.generators]
        amount = scale * residual_scale
        if residual == "task_arithmetic":
            moved = found.move(found.combined([rotated, *explained], [1.0] + [-amount] * len(ws)))
            return w0 + moved + amount * weighted_sum(vectors)
        rest = [d - found.move(part).to(d) for d, part in zip(vectors, explained, strict=True)]
        options = {"density": density} if residual == "ties" else {}
        merge = {"ties": ties, "tsv_m": tsv_m}[residual]
        return w0 + found.move(rotated) + merge(torch.zeros_like(w0), rest, scale=amount, **options)

    return on_the_right(merged, [base, *experts], side)


def lie_sum(
    base: Equivariant,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    weights: Sequence[float] | None = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
    rotations: Given = None,
) -> Tensor:
    """Sum in the Lie algebra: `W0 exp(scale sum w_k log R_k) + scale residual_scale sum w_k E_k`."""

    def rule(found: Turns, w: Sequence[float]) -> Turn:
        return found.exp(found.combined([found.log(q) for q in found.generators], w))

    w = [scale * weight for weight in weights or [1.0] * len(experts)]
    return turned(rule, base, experts, w, residual_scale, side, anchor, rotations)


def sequential(
    base: Equivariant,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    weights: Sequence[float] | None = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
    rotations: Given = None,
) -> Tensor:
    """One rotation after the other: `W0 R_1^{scale w_1} ... R_T^{scale w_T} + scale residual_scale sum w_k E_k`.

    In the order of the experts; lie_sum where rotations commute. What it gives in another order is how far they don't.
    """

    def rule(found: Turns, w: Sequence[float]) -> Turn:
        logs = [found.log(q) for q in found.generators]
        powers = [log._replace(theta=share * log.theta) for log, share in zip(logs, w, strict=True)]
        each = (found.combined([found.exp(power, rows=power.theta.shape[-1])]) for power in powers)
        return reduce(found.compose, each)

    w = [scale * weight for weight in weights or [1.0] * len(experts)]
    return turned(rule, base, experts, w, residual_scale, side, anchor, rotations)


def turned(
    rule: Callable[[Turns, Sequence[float]], Turn],
    base: Tensor,
    experts: Sequence[Tensor],
    w: Sequence[float],
    residual_scale: float,
    side: Side,
    anchor: float,
    rotations: Given,
) -> Tensor:
    """`W0 R + residual_scale sum w_k E_k`, R - I what `rule` makes of the experts' rotations and their w_k."""
    side, given = on_one_side(rotations, side)

    def merged(w0: Tensor, *ws: Tensor) -> Tensor:
        vectors = [x - w0 for x in ws]
        found = given_turns(w0, given) if given else turns(w0, vectors, anchor=anchor)
        whole = rule(found, w)
        rows = Turn(whole.theta[..., : found.rank, :], whole.of)
        return w0 + with_residuals(found, rows, vectors, [residual_scale * share for share in w])

    return on_the_right(merged, [base, *experts], side)


def geodesic(
    base: Equivariant, experts: Pair, *, t: float = 0.5, side: Side = "right", anchor: NonNegative = 0.01
) -> Tensor:
    """From the first expert to the second along their rotation: `W(t) = W_A exp(t log R) + t (W_B - W_A R)`.

    t = 0 is A and t = 1 exactly B: at its ends nothing is merged. R is the closed form from W_A to W_B.
    """

    def merged(first: Tensor, second: Tensor) -> Tensor:
        vectors = [second - first]
        found = turns(first, vectors, anchor=anchor)
        rotated = found.exp(found.combined([found.log(found.generators[0])], [t]))
        return first + with_residuals(found, rotated, vectors, [t])

    return on_the_right(merged, experts, side)


def with_residuals(found: Turns, rotated: Turn, vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`W0 (R - I) + sum w_k E_k` with the rows of V in R - I and `E_k = d_k - W0 (R_k - I)`."""
    explained = [found.cayley(q) for q in found.generators]
    moved = found.move(found.combined([rotated, *explained], [1.0, *(-weight for weight in weights)]))
    return moved + weighted_sum(vectors, weights)


def geodesic_aligned(base: Rows, experts: Pair, *, source: Tensor, rotation: Rotation | None, t: float = 0.5) -> Tensor:
    """The geodesic along the alignment of the first expert to the second, `W_A R^t + t (W_B - W_A R)`.

    Where a tensor has no rotation it is the chord.
    """
    first, second = experts
    if not torch.equal(source, first):
        raise ConfigError("the rotations apply to other weights than the first expert's; align with source=<first>")
    r = rotation or Rotation()
    whole = r.apply(first.double())
    return (r.apply(first.double(), t) + t * (second - whole)).to(base)


def learned(
    base: Rows, experts: Sequence[Tensor], *, source: Tensor, rotation: Rotation | Delta | None, t: float = 1.0
) -> Tensor:
    """On the way to what the align stage learned: `S R^t`, or `S + t delta` where that is no rotation.

    S are the weights that it was learned for, and the whole way is t = 1. The rest is as it is there.
    """
    return source if rotation is None else rotation.apply(source, t).to(base)


def _conflicting(vectors: Sequence[Tensor]) -> list[Tensor]:
    mean = weighted_sum(vectors)
    return [d * ((d * mean).sum(-1, keepdim=True) < 0) for d in vectors]


def on_one_side(rotations: Given, side: Side) -> tuple[Side, Sequence[Tensor | None]]:
    """The side of given rotations, and what they are as right ones; `side` and nothing where there are none."""
    if rotations is None:
        return side, []
    sides = [name for name in SIDES for r in rotations if r is not None and getattr(r, name) is not None]
    side = sides[0] if sides else side  # type: ignore[assignment]
    matrices = [None if r is None else getattr(r, side) for r in rotations]
    return side, [m if m is None or side == "right" else m.mT for m in matrices]


def on_the_right(rule: Callable[..., Tensor], matrices: Sequence[Tensor], side: Side) -> Tensor:
    """`rule`, which rotates the right side of the first of the matrices, on `side`; in their dtype."""
    if side == "left":
        return on_the_right(rule, [m.mT for m in matrices], "right").mT.contiguous()
    return rule(*matrices).to(matrices[0])


def how(shape: Sequence[int], side: Side) -> str:
    """What a rotation on this side of a matrix turns, in words for the plan."""
    outputs, inputs = shape
    size, other, what = (inputs, outputs, "columns") if side == "right" else (outputs, inputs, "rows")
    if size <= other:
        return f"{side} side, {size} {what}"
    return f"{side} side, {size} {what} by {other} x {other} matrices"
