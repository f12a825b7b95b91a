"""Merges on the sphere: of the weights or of the task vectors `d_i = W_i - W0`, each tensor, row or column a vector.

RL experts of one base lie 1e-3 rad apart, where acos of a cosine has lost all its digits: angles are
`2 atan2(|u - v|, |u + v|)`, in float64, and no threshold on the cosine switches to the chord. Every merge here is a
combination of (W0, d_1, ..., d_T) whose coefficients follow from their inner products, once for all pieces of a tensor:
no unit vector is formed.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

import torch
from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.merge.linear import shares, weighted_sum
from rotrl.merge.summary import Gram, inner_products
from rotrl.merge.types import Averaged, Count, Pair, Positive, Rows

Vectors = Literal["task", "model"]
OPPOSITE = 1e-6
"""Radians short of 180 degrees within which no arc is shortest."""


def slerp(base: Rows, experts: Pair, *, t: float = 0.5, summary: Gram | None = None) -> Tensor:
    """Spherical interpolation of two experts, each tensor as one vector, the lengths interpolated. Shoemake (1985).

    `u(t) = (sin((1-t) a) u_1 + sin(t a) u_2) / sin a`, W = ((1-t) |W_1| + t |W_2|) u(t). NumericsError where the
    experts point in opposite directions.
    """
    return _combination(base, experts, _on_arc(summary or _gram(base, experts), t), "model")


@lru_cache(maxsize=1)
def _on_arc(gram: Gram, t: float) -> Tensor:
    inner = gram.inner
    pair, chord = _vectors(inner, "model"), inner.new_tensor([1 - t, t])
    lengths = _length(inner, pair)
    if not all(lengths):
        return chord @ pair
    units = pair / lengths[:, None]
    angle = _angle(inner, units[0], units[1])
    if torch.pi - angle < OPPOSITE:
        raise NumericsError("the two experts point in opposite directions, no arc between them is shortest")
    return (chord @ lengths) * (_arc(angle, t) @ units)


def nuslerp(
    base: Rows,
    experts: Annotated[Pair, "averaged"],
    *,
    vectors: Vectors = "task",
    axis: Literal["tensor", "row", "column"] = "tensor",
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    summary: Gram | None = None,
) -> Tensor:
    """`W0 + scale d(t)`, d(t) = `(sin((1-t) a) d_1 + sin(t a) d_2) / sin a`, t = w_2 / (w_1 + w_2). As in mergekit.

    a is the angle of the two task vectors (or of the two models, `vectors=model`, then d(t) is their arc less W0),
    taken whole or by rows or columns of a matrix. The chord where one is zero or both are opposite.
    """
    t = shares(weights, 2, positive=True)[1]
    c = _on_arcs(summary or _gram(base, experts, axis), vectors, t)
    return _combination(base, experts, c, vectors, scale, axis)


@lru_cache(maxsize=1)
def _on_arcs(gram: Gram, vectors: Vectors, t: float) -> Tensor:
    inner = gram.inner
    pair = _vectors(inner, vectors).expand(*inner.shape[:-2], -1, -1)
    lengths = _length(inner, pair)
    units = pair / lengths.clamp(min=torch.finfo(inner.dtype).tiny)[..., None]
    angle = _angle(inner, units[..., 0, :], units[..., 1, :])
    no_arc = (torch.pi - angle < OPPOSITE) | (lengths.prod(-1) == 0)
    parts = torch.where(no_arc[..., None], inner.new_tensor([1 - t, t]), _arc(angle, t))
    return (parts[..., None, :] @ pair)[..., 0, :]


def multislerp(
    base: Rows,
    experts: Averaged,
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    summary: Gram | None = None,
) -> Tensor:
    """`W0 + scale mean|d_i| u`, u the normalised weighted mean of the directions d_i / |d_i|. As in mergekit.

    mergekit also averages the projections on the tangent space at u, a mean that vanishes identically.
    NumericsError where the directions cancel.
    """
    w = tuple(shares(weights, len(experts), positive=True))
    return _combination(base, experts, _mean_direction(summary or _gram(base, experts), w), "task", scale)


@lru_cache(maxsize=1)
def _mean_direction(gram: Gram, weights: tuple[float, ...]) -> Tensor:
    inner = gram.inner
    w, lengths, units = _directions(inner, "task", weights)
    return (w @ lengths) * _unit(inner, w @ units) if lengths.any() else torch.zeros_like(inner[0])


def karcher(
    base: Rows,
    experts: Sequence[Tensor],
    *,
    max_iter: Count = 10,
    tol: Positive = 1e-5,
    weights: Sequence[float] | None = None,
    summary: Gram | None = None,
) -> Tensor:
    """Riemannian mean of the experts on the sphere, each tensor one vector, times their mean length. arXiv 2603.04972.

    Iterates `u <- exp_u(sum w_i log_u u_i)` from the normalised mean until the step is below `tol` radians.
    """
    w = tuple(shares(weights, len(experts), positive=True))
    return _combination(base, experts, _karcher_mean(summary or _gram(base, experts), max_iter, tol, w), "model")


@lru_cache(maxsize=1)
def _karcher_mean(gram: Gram, max_iter: int, tol: float, weights: tuple[float, ...]) -> Tensor:
    inner = gram.inner
    w, lengths, units = _directions(inner, "model", weights)
    if not lengths.any():
        return torch.zeros_like(inner[0])
    u = _unit(inner, w @ units)
    for _ in range(max_iter):
        angles = _angle(inner, u, units)
        across = units - angles.cos()[:, None] * u
        step = (w * (lengths > 0) / torch.sinc(angles / torch.pi)) @ across
        size = _length(inner, step)
        u = _unit(inner, u * size.cos() + step * torch.sinc(size / torch.pi))
        if size < tol:
            break
    return (w @ lengths) * u


def _gram(base: Tensor, experts: Sequence[Tensor], axis: str = "tensor") -> Gram:
    return Gram(inner_products([base, *(expert - base for expert in experts)], axis))


def _vectors(inner: Tensor, vectors: Vectors) -> Tensor:
    """The task vectors or models as combinations of (W0, d_1, ..., d_T), one a row."""
    rows = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)[1:]
    rows[:, 0] = 1.0 if vectors == "model" else 0.0
    return rows


def _directions(inner: Tensor, vectors: Vectors, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (T), lengths (T) and unit vectors as combinations; a zero vector has no direction."""
    rows = _vectors(inner, vectors)
    w = inner.new_tensor(weights)
    lengths = _length(inner, rows)
    units = rows / lengths.clamp(min=torch.finfo(inner.dtype).tiny)[:, None]
    return w, lengths, torch.where(lengths[:, None] > 0, units, 0.0)


def _length(inner: Tensor, rows: Tensor) -> Tensor:
    """Lengths of combinations (..., T + 1)."""
    if inner.ndim > 2 and rows.ndim < inner.ndim:  # one combination for each of several matrices
        return _length(inner, rows[..., None, :])[..., 0]
    return ((rows @ inner) * rows).sum(-1).clamp(min=0).sqrt()


def _unit(inner: Tensor, u: Tensor) -> Tensor:
    length = _length(inner, u)
    if length < OPPOSITE:
        raise NumericsError("the experts' directions cancel, no mean direction exists; use other weights")
    return u / length


def _angle(inner: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Angles of unit vectors that are given as combinations."""
    return 2 * torch.atan2(_length(inner, u - v), _length(inner, u + v))


def _combination(
    base: Tensor, experts: Sequence[Tensor], c: Tensor, vectors: Vectors, scale: float = 1.0, axis: str = "tensor"
) -> Tensor:
    """`c_0 W0 + sum c_i d_i` (plus W0 of task vectors), its difference to W0 times `scale`; c may differ by row."""
    c = scale * (c - c.new_tensor([1.0] + [0.0] * len(experts)) if vectors == "model" else c)
    parts = [base, *(expert - base for expert in experts)]
    if c.ndim == 1:
        return weighted_sum(parts, c.tolist()).add_(base)
    by_part = c.to(base).unbind(-1)
    return base + sum(x * (y[:, None] if axis == "row" else y) for x, y in zip(parts, by_part, strict=True))


def _arc(angle: Tensor, t: float) -> Tensor:
    """(..., 2): sin((1-t) a) / sin a and sin(t a) / sin a, both at their limits where a is 0."""
    ends = torch.stack([(1 - t) * torch.sinc((1 - t) * angle / torch.pi), t * torch.sinc(t * angle / torch.pi)], -1)
    return ends / torch.sinc(angle / torch.pi)[..., None]
