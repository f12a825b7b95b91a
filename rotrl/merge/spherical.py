"""Merges on the sphere: of the weights or of the task vectors `d_i = W_i - W0`, each tensor, row or column a vector.

RL experts of one base lie 1e-3 rad apart, where acos of a cosine has lost all its digits: angles are
`2 atan2(|u - v|, |u + v|)`, in float64, and no threshold on the cosine switches to the chord.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.merge.linear import shares
from rotrl.merge.types import Pair, Within

OPPOSITE = 1e-6
"""Radians short of 180 degrees within which no arc is shortest."""


def slerp(base: Tensor, experts: Pair, *, t: float = 0.5) -> Tensor:
    """Spherical interpolation of two experts, each tensor as one vector, the lengths interpolated. Shoemake (1985).

    `u(t) = (sin((1-t) a) u_1 + sin(t a) u_2) / sin a`, W = ((1-t) |W_1| + t |W_2|) u(t). NumericsError where the
    experts point in opposite directions.
    """
    first, second = (expert.double() for expert in experts)
    lengths = first.norm(), second.norm()
    if not all(lengths):
        return (first + t * (second - first)).to(base)
    u, v = (first / lengths[0]).flatten(), (second / lengths[1]).flatten()
    angle = _angle(u, v)
    if torch.pi - angle < OPPOSITE:
        raise NumericsError("the two experts point in opposite directions, no arc between them is shortest")
    start, end = _arc(angle, t)
    return (((1 - t) * lengths[0] + t * lengths[1]) * (start * u + end * v)).reshape(base.shape).to(base)


def nuslerp(
    base: Tensor,
    experts: Pair,
    *,
    vectors: Literal["task", "model"] = "task",
    axis: Literal["tensor", "row", "column"] = "tensor",
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """`W0 + scale d(t)`, d(t) = `(sin((1-t) a) d_1 + sin(t a) d_2) / sin a`, t = w_2 / (w_1 + w_2). As in mergekit.

    a is the angle of the two task vectors (or of the two models, `vectors=model`, then d(t) is their arc less W0),
    taken whole or by rows or columns of a matrix. The chord where one is zero or both are opposite.
    """
    t = shares(weights, 2, positive=True)[1]
    origin = base if vectors == "task" else torch.zeros_like(base)
    pair = [_rows((expert - origin).double(), axis) for expert in experts]
    units = [x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in pair]
    angle = _angle(*units)
    start, end = _arc(angle, t)
    no_arc = (torch.pi - angle < OPPOSITE) | (
        pair[0].norm(dim=-1, keepdim=True) * pair[1].norm(dim=-1, keepdim=True) == 0
    )
    arc = torch.where(no_arc, (1 - t) * pair[0] + t * pair[1], start * pair[0] + end * pair[1])
    whole = arc.mT if axis == "column" and base.ndim == 2 else arc
    return (base + scale * (whole.reshape(base.shape) + origin - base)).to(base)


def multislerp(
    base: Tensor, experts: Sequence[Tensor], *, scale: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """`W0 + scale mean|d_i| u`, u the normalised weighted mean of the directions d_i / |d_i|. As in mergekit.

    mergekit also averages the projections on the tangent space at u, a mean that vanishes identically.
    NumericsError where the directions cancel.
    """
    w, lengths, units = _directions([expert - base for expert in experts], weights)
    mean = torch.einsum("i,i...->...", w, units)
    if not lengths.any():
        return base.clone()
    return (base + scale * (w @ lengths) * _unit(mean)).to(base)


def karcher(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    max_iter: Annotated[int, Within(1)] = 10,
    tol: Annotated[float, Within(0, above=True)] = 1e-5,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Riemannian mean of the experts on the sphere, each tensor one vector, times their mean length. arXiv 2603.04972.

    Iterates `u <- exp_u(sum w_i log_u u_i)` from the normalised mean until the step is below `tol` radians.
    """
    w, lengths, units = _directions(experts, weights)
    if not lengths.any():
        return torch.zeros_like(base)
    shape = (-1, *[1] * base.ndim)
    u = _unit(torch.einsum("i,i...->...", w, units))
    for _ in range(max_iter):
        angles = torch.stack([_angle(u.flatten(), v.flatten()) for v in units])
        across = units - angles.cos().reshape(shape) * u
        step = torch.einsum("i,i...->...", w * (lengths > 0) / torch.sinc(angles.squeeze(-1) / torch.pi), across)
        size = step.norm()
        u = _unit(u * size.cos() + step * torch.sinc(size / torch.pi))
        if size < tol:
            break
    return ((w @ lengths) * u).to(base)


def _directions(vectors: Sequence[Tensor], weights: Sequence[float] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised weights (T), lengths (T) and unit vectors (T, ...) in float64; a zero vector has no direction."""
    x = torch.stack(list(vectors)).double()
    w = torch.tensor(shares(weights, len(vectors), positive=True), dtype=x.dtype, device=x.device)
    lengths = x.flatten(1).norm(dim=1)
    units = x / lengths.clamp(min=torch.finfo(x.dtype).tiny).reshape(-1, *[1] * (x.ndim - 1))
    return w, lengths, units


def _unit(x: Tensor) -> Tensor:
    if x.norm() < OPPOSITE:
        raise NumericsError("the experts' directions cancel, no mean direction exists; use other weights")
    return x / x.norm()


def _rows(x: Tensor, axis: str) -> Tensor:
    if axis == "tensor" or x.ndim != 2:
        return x.flatten()
    return x if axis == "row" else x.mT


def _angle(u: Tensor, v: Tensor) -> Tensor:
    """Angle of unit vectors along the last dimension, which is kept."""
    return 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))


def _arc(angle: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """sin((1-t) a) / sin a and sin(t a) / sin a, both at their limits where a is 0."""
    sine = torch.sinc(angle / torch.pi)
    return (1 - t) * torch.sinc((1 - t) * angle / torch.pi) / sine, t * torch.sinc(t * angle / torch.pi) / sine
