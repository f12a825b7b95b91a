"""Means of the experts' rotations: in the Lie algebra, on the group, and in the matrices around it.

R_k and E_k as in `rotation`, weights are divided by their sum. All three agree to second order in the angles.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.linalg.procrustes import polar, procrustes
from rotrl.linalg.rotation import exp, geodesic, log
from rotrl.merge.linear import shares, weighted_sum
from rotrl.merge.rotation import lie_sum, on_the_right
from rotrl.merge.types import Matrix, NonNegative, Side, Within

Weights = Sequence[float] | None


def lie_mean(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    weights: Weights = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
) -> Tensor:
    """Mean in the Lie algebra: `W0 exp(scale mean log R_k) + scale residual_scale mean E_k`."""
    mean = shares(weights, len(experts), positive=True)
    return lie_sum(base, experts, scale=scale, residual_scale=residual_scale, weights=mean, side=side, anchor=anchor)


def karcher_rotation(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    max_iter: Annotated[int, Within(1)] = 50,
    tol: Annotated[float, Within(0, above=True)] = 1e-12,
    weights: Weights = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
) -> Tensor:
    """Riemannian mean R of the rotations: `W0 R^scale + scale residual_scale mean E_k`.

    R solves `sum w_k log(R^T R_k) = 0`, iterated as `R <- R exp(sum w_k log(R^T R_k))` until the step's norm is below
    `tol`. NumericsError where it is not within `max_iter` steps.
    """

    def mean(rotations: Sequence[Tensor], w: Sequence[float]) -> Tensor:
        r = polar(weighted_sum(rotations, w))
        for _ in range(max_iter):
            step = weighted_sum([log(r.mT @ other) for other in rotations], w)
            r = r @ exp(step)
            if step.norm() < tol:
                return r
        raise NumericsError(f"no mean rotation within {max_iter} steps; use merge=chordal or a larger anchor")

    return _averaged(mean, base, experts, scale, residual_scale, weights, side, anchor)


def chordal(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    weights: Weights = None,
    side: Side = "right",
    anchor: NonNegative = 0.01,
) -> Tensor:
    """Chordal mean `R = polar(sum w_k R_k)`, nearest to all in Frobenius norm: `W0 R^scale + scale mean E_k`.

    The residuals' mean is multiplied by `residual_scale` too.
    """

    def mean(rotations: Sequence[Tensor], w: Sequence[float]) -> Tensor:
        return polar(weighted_sum(rotations, w))

    return _averaged(mean, base, experts, scale, residual_scale, weights, side, anchor)


def _averaged(
    mean: Callable[[Sequence[Tensor], Sequence[float]], Tensor],
    base: Tensor,
    experts: Sequence[Tensor],
    scale: float,
    residual_scale: float,
    weights: Weights,
    side: Side,
    anchor: float,
) -> Tensor:
    w = shares(weights, len(experts), positive=True)

    def rotate(w0: Tensor, *ws: Tensor) -> list[Tensor]:
        rotations = [procrustes(w0, w, side="right", anchor=anchor) for w in ws]
        whole = mean(rotations, w)
        return [w0 @ (whole if scale == 1 else geodesic(whole, scale)), *(w0 @ r for r in rotations)]

    turned, *explained = on_the_right(rotate, [base, *experts], side)
    rest = [expert - part for expert, part in zip(experts, explained, strict=True)]
    return (turned + scale * residual_scale * weighted_sum(rest, w)).to(base)
