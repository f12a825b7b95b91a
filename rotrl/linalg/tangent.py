"""How much of an update is a first-order rotation of its base, beside what any update of the same size would show.

LEFT rotations move W0 along {A W0: A skew (m, m)}, RIGHT along {W0 B: B skew (n, n)}, BOTH along their sum. With
T = U^T D V (see spectrum.coordinates) all are diagonal in the pairs (i, j), (j, i), so no linear system is solved and
near-equal singular values do no harm to one side alone.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rotrl.linalg.spectrum import Basis, Coordinates, Side, basis, coordinates

Sides = Literal["left", "right", "both"]


class Tangency(NamedTuple):
    """share of ||D||^2 in the tangent space; its mean `null` and standard deviation `spread` over sign flips of T."""

    share: Tensor
    null: Tensor
    spread: Tensor

    @property
    def kappa(self) -> Tensor:
        """(share - null) / (1 - null): 0 for no rotation, 1 for an exact one, negative for a stretch."""
        return (self.share - self.null) / (1 - self.null)

    @property
    def kappa_spread(self) -> Tensor:
        """Standard deviation of kappa over sign flips of T, where its mean is 0."""
        return self.spread / (1 - self.null)


def tangency(c: Coordinates, *, side: Sides) -> Tangency:
    """Share, null and spread in closed form; NaN where D = 0.

    Left: share = sum_{i<j<=r} (s_j T_ij - s_i T_ji)^2 / (s_i^2 + s_j^2) + sum_{i>r} T_ij^2, over ||D||^2.
    Independent signs on T_ij leave the mean sum_{i<j} (s_j^2 T_ij^2 + s_i^2 T_ji^2) / (s_i^2 + s_j^2) + free block and
    the variance sum_{i<j} (2 s_i s_j T_ij T_ji / (s_i^2 + s_j^2))^2. Right: T transposed. share - null is therefore
    the same number on both sides: kappa alone says whether an update turns, its size on each side says where.
    """
    if side == "right":
        return tangency(c.mT, side="left")
    weighted = c.T * c.s.unsqueeze(-2)
    pairs = _inverse_pair_energy(c.s)
    own = weighted.square() * pairs
    cross = weighted * weighted.mT * pairs
    free = (c.below * (c.s > 0)).sum(-1)
    if side == "both":
        distinct = _distinct(c.s)
        own, cross = torch.where(distinct, c.T.square(), own), torch.where(distinct, 0.0, cross)
        free = free + (c.beside * (c.s > 0)).sum(-1)
    own, cross = _off_diagonal(own), _off_diagonal(cross)
    null = own.sum((-2, -1)) + free
    share = null - cross.sum((-2, -1))
    spread = (2 * cross.square().sum((-2, -1))).sqrt()
    return Tangency(*(value / c.energy for value in (share, null, spread)))


def tangent_share(W0: Tensor | Basis, D: Tensor, *, side: Sides) -> Tensor:
    """||P_T D||^2 / ||D||^2, one number a matrix. For random D it is large too: read it beside null_share."""
    return tangency(coordinates(W0, D), side=side).share


def null_share(W0: Tensor | Basis, D: Tensor, *, side: Sides) -> Tensor:
    """Mean of tangent_share over independent sign flips of the entries of U^T D V, in closed form."""
    return tangency(coordinates(W0, D), side=side).null


def kappa(W0: Tensor | Basis, D: Tensor, *, side: Side) -> Tensor:
    """(share - null) / (1 - null): 0 nothing, 1 an exact one-sided rotation, negative a stretch. Not linear between."""
    return tangency(coordinates(W0, D), side=side).kappa


def tangent_projection(W0: Tensor | Basis, D: Tensor, *, side: Sides) -> Tensor:
    """P_T D, the update of a first-order rotation of W0 nearest to D in Frobenius norm; dtype and shape of D.

    One side needs the eigenvectors of the smaller Gram matrix of W0 only: with r = min(m, n) nothing larger than r x r
    is decomposed, in float64. A `Basis` in place of W0 saves even that.
    """
    if side == "right":
        return tangent_projection(W0.mT, D.mT, side="left").mT
    if not isinstance(W0, Basis) and side == "left":
        return _left_projection(W0, D)
    frame = basis(W0)
    if side == "both" and D.shape[-2] < D.shape[-1]:
        return tangent_projection(frame.mT, D.mT, side="both").mT
    U, s, V = frame
    image = D.double() @ V
    T = U.mT @ image
    inner = _left_pairs(T, s) * s.unsqueeze(-2)
    if side == "both":
        inner = torch.where(_distinct(s), _off_diagonal(T), inner)
    columns = U @ inner
    if U.shape[-2] > s.shape[-1]:
        columns = columns + (image - U @ T) * (s > 0).unsqueeze(-2)
    return (columns @ V.mT).to(D.dtype)


def _left_projection(W0: Tensor, D: Tensor) -> Tensor:
    """`A W0` where `G A + A G = D W0^T - W0 D^T`, `G = W0 W0^T`; of a tall W0 what is left of D without its stretch.

    All that no left rotation of a tall W0 reaches is W0 X with a symmetric X, `G X + X G = W0^T D + D^T W0` and
    `G = W0^T W0`, and what D does to the null space of W0.
    """
    w, d = W0.double(), D.double()
    tall = w.shape[-2] > w.shape[-1]
    energies, axes = torch.linalg.eigh(w.mT @ w if tall else w @ w.mT)
    energies = energies.clamp_min(0.0)
    present = energies > max(w.shape[-2:]) * torch.finfo(energies.dtype).eps * energies[..., -1:]
    total = energies.unsqueeze(-1) + energies.unsqueeze(-2)
    weight = torch.where(present.unsqueeze(-1) | present.unsqueeze(-2), 1 / total, 0.0)
    image = axes.mT @ (w.mT @ d if tall else d @ w.mT) @ axes
    solution = axes @ (weight * (image + image.mT if tall else image - image.mT)) @ axes.mT
    if not tall:
        return solution.to(D) @ W0.to(D)
    rest = D - W0.to(D) @ solution.to(D)
    if present.all():
        return rest
    return rest @ (axes * present.unsqueeze(-2) @ axes.mT).to(D)


def tangent_part(c: Coordinates, *, side: Side) -> Coordinates:
    """The coordinates of P_T D: tangent_projection without leaving the singular basis."""
    if side == "right":
        return tangent_part(c.mT, side="left").mT
    T = _left_pairs(c.T, c.s) * c.s.unsqueeze(-2)
    below = c.below * (c.s > 0)
    energy = T.square().sum((-2, -1)) + below.sum(-1)
    return Coordinates(c.s, T, below, torch.zeros_like(c.beside), energy, c.shape)


def generator(W0: Tensor | Basis, D: Tensor, *, side: Side) -> Tensor:
    """Skew A (m, m) with A W0 = P_T D, or B (n, n) with W0 B = P_T D: least squares of least norm, float64.

    a_ij = (s_j T_ij - s_i T_ji) / (s_i^2 + s_j^2), free block T_ij / s_j, 0 on the null space of W0.
    """
    frame = basis(W0)
    if side == "right":
        return generator(frame.mT, D.mT, side="left").mT
    U, s, V = frame
    image = D.double() @ V
    T = U.mT @ image
    A = U @ _left_pairs(T, s) @ U.mT
    if U.shape[-2] > s.shape[-1]:
        free = ((image - U @ T) * torch.where(s > 0, 1 / s, 0.0).unsqueeze(-2)) @ U.mT
        A = A + free - free.mT
    return A


def _left_pairs(T: Tensor, s: Tensor) -> Tensor:
    weighted = T * s.unsqueeze(-2)
    return (weighted - weighted.mT) * _inverse_pair_energy(s)


def _inverse_pair_energy(s: Tensor) -> Tensor:
    """1 / (s_i^2 + s_j^2), 0 where both vanish: no rotation reaches such a pair."""
    total = s.square().unsqueeze(-1) + s.square().unsqueeze(-2)
    return torch.where(total > 0, 1 / total, 0.0)


def _distinct(s: Tensor) -> Tensor:
    """Pairs that two simultaneous rotations reach whole: with equal singular values only their skew part is."""
    gap = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs()
    return gap > s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1, None]


def _off_diagonal(M: Tensor) -> Tensor:
    return M - torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))
