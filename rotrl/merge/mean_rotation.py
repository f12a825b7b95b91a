"""Means of the experts' rotations: in the Lie algebra, on the group, and in the matrices around it.

R_k and E_k as in `rotation`, weights are divided by their sum. All three agree to second order in the angles.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.linalg.turns import Turn, Turns
from rotrl.merge.linear import shares
from rotrl.merge.rotation import Given, lie_sum, turned
from rotrl.merge.types import Averaged, Count, Equivariant, NonNegative, Positive, Side

Weights = Sequence[float] | None


def lie_mean(
    base: Equivariant,
    experts: Averaged,
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    weights: Weights = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
    rotations: Given = None,
) -> Tensor:
    """Mean in the Lie algebra: `W0 exp(scale mean log R_k) + scale residual_scale mean E_k`."""
    mean = shares(weights, len(experts), positive=True)
    rest = {"residual_scale": residual_scale, "side": side, "anchor": anchor, "rotations": rotations}
    return lie_sum(base, experts, scale=scale, weights=mean, **rest)


def karcher_rotation(
    base: Equivariant,
    experts: Averaged,
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    max_iter: Count = 50,
    tol: Positive = 1e-12,
    weights: Weights = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
    rotations: Given = None,
) -> Tensor:
    """Riemannian mean R of the rotations: `W0 R^scale + scale residual_scale mean E_k`.

    R solves `sum w_k log(R^T R_k) = 0`, iterated as `R <- R exp(sum w_k log(R^T R_k))` until the step's norm is below
    `tol` (in float32 below 1e-6 of the rotation's). NumericsError where it is not within `max_iter` steps.
    """

    def mean(found: Turns, rotations: Sequence[Turn], w: Sequence[float]) -> Turn:
        r = found.polar(found.combined(rotations, w))
        for _ in range(max_iter):
            back = Turn(r.theta.mT, r.of)
            between = [found.compose(back, found.combined([other])) for other in rotations]
            step = found.combined([found.log(found.inverse_cayley(x)) for x in between], w)
            r = found.compose(r, found.exp(step, rows=step.theta.shape[-1]))
            if step.theta.norm() < max(tol, 8 * torch.finfo(r.theta.dtype).eps * float(r.theta.norm())):
                return r
        raise NumericsError(f"no mean rotation within {max_iter} steps; use merge=chordal or a larger anchor")

    return _averaged(mean, base, experts, scale, residual_scale, weights, side, anchor, rotations)


def chordal(
    base: Equivariant,
    experts: Averaged,
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    weights: Weights = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
    rotations: Given = None,
) -> Tensor:
    """Chordal mean `R = polar(sum w_k R_k)`, nearest to all in Frobenius norm: `W0 R^scale + scale mean E_k`.

    The residuals' mean is multiplied by `residual_scale` too.
    """

    def mean(found: Turns, rotations: Sequence[Turn], w: Sequence[float]) -> Turn:
        return found.polar(found.combined(rotations, w))

    return _averaged(mean, base, experts, scale, residual_scale, weights, side, anchor, rotations)


def _averaged(
    mean: Callable[[Turns, Sequence[Turn], Sequence[float]], Turn],
    base: Tensor,
    experts: Sequence[Tensor],
    scale: float,
    residual_scale: float,
    weights: Weights,
    side: Side,
    anchor: float,
    rotations: Given,
) -> Tensor:

    def rule(found: Turns, w: Sequence[float]) -> Turn:
        whole = mean(found, [found.whole(q) for q in found.generators], w)
        if scale == 1:
            return whole
        return found.exp(found.combined([found.log(found.inverse_cayley(whole))], [scale]))

    w = shares(weights, len(experts), positive=True)
    return turned(rule, base, experts, w, scale * residual_scale, side, anchor, rotations)
