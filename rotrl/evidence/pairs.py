"""Two updates of one base beside each other: do two runs move alike, and do their rotations commute?

Baselines come from independent signs of the entries of the second update in the singular basis of the base, which keep
where its energy lies; for the masks, from independent masks and from noise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rotrl.evidence.bands import turns
from rotrl.evidence.masks import jaccard, jaccard_random
from rotrl.linalg.spectrum import Coordinates, Side

COLUMNS = [
    "a",
    "b",
    "tensor",
    "layer",
    "module",
    "norm_a",
    "norm_b",
    "cosine",
    "cosine_spread",
    "generators",
    "generators_spread",
    "commutator",
    "commutator_null",
    "jaccard",
    "jaccard_random",
    "jaccard_noise",
]


class Update(NamedTuple):
    """D (..., m, n), its coordinates, the entries that it changes in bfloat16, and those that such noise does."""

    D: Tensor
    c: Coordinates
    mask: Tensor
    noise: Tensor | None = None


def pair_row(a: Update, b: Update) -> dict[str, Tensor]:
    """cosine of the updates and of their generators, their commutator, and the Jaccard index of their masks.

    Generators are those on the smaller side, where a rotation explains least of any update; <A, B> / (||A|| ||B||), and
    the commutator ||AB - BA|| / (||A|| ||B||). Spreads are standard deviations about 0 and commutator_null the root
    mean square over signs of T of b, in closed form. Of a batch each of these is a tensor.
    """
    m, n = a.c.shape
    side: Side = "left" if m <= n else "right"
    norm_a, norm_b = a.c.energy.sqrt(), b.c.energy.sqrt()
    row = {"norm_a": norm_a, "norm_b": norm_b}
    row["cosine"] = _inner(a.D, b.D) / (norm_a * norm_b)
    row["cosine_spread"] = _inner_variance(a.c, b.c).sqrt() / (norm_a * norm_b)
    A, B, variance = turns(a.c, side=side), turns(b.c, side=side), turn_variance(b.c, side=side)
    size, other = torch.linalg.matrix_norm(A), torch.linalg.matrix_norm(B)
    mean = variance.sum((-2, -1)).sqrt()  # of ||B|| over the signs, which is not the ||B|| at hand
    both = _inner(A.square(), variance)
    commutes = 2 * (A.square().sum(-2) * variance.sum(-2)).sum(-1) - 2 * both
    row["generators"] = _inner(A, B) / (size * other)
    row["generators_spread"] = (2 * both).sqrt() / (size * mean)
    row["commutator"] = torch.linalg.matrix_norm(A @ B - B @ A) / (size * other)
    row["commutator_null"] = commutes.clamp_min(0).sqrt() / (size * mean)
    row |= {"jaccard": jaccard(a.mask, b.mask), "jaccard_random": jaccard_random(a.mask, b.mask)}
    if a.noise is not None and b.noise is not None:
        row["jaccard_noise"] = jaccard(a.noise, b.noise)
    return row


def turn_variance(c: Coordinates, *, side: Side) -> Tensor:
    """Variance of each entry of `turns` over independent signs of T, (r, r) symmetric, 0 on the diagonal."""
    if side == "right":
        return turn_variance(c.mT, side="left")
    squares = (c.T * c.s.unsqueeze(-2)).square()
    total = (c.s.square().unsqueeze(-1) + c.s.square().unsqueeze(-2)).square()
    both = torch.where(total > 0, (squares + squares.mT) / total, 0.0)
    return both - torch.diag_embed(both.diagonal(dim1=-2, dim2=-1))


def _inner_variance(a: Coordinates, b: Coordinates) -> Tensor:
    """Of <D_a, D_b> over independent signs of b's entries; beyond the basis energy counts as evenly spread."""
    inner = _inner(a.T.square(), b.T.square())
    (m, n), r = a.shape, a.s.shape[-1]
    outer = (a.below * b.below).sum(-1) / max(1, m - r) + (a.beside * b.beside).sum(-1) / max(1, n - r)
    return inner + outer


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum((-2, -1))
