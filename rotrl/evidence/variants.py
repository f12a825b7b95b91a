"""Weights between the base and an expert: the parts of an update, each beside what costs the same energy.

A variant is a function of one matrix (the base's singular basis, W0, the update D) that gives the update to apply in
place of D. All work on the small side of the matrix: the one on which few directions are rotations (of the tall
matrices of an MLP the larger side's rotations hold 91 % of any update), or the side that is asked for.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
from torch import Generator, Tensor

from rotrl.linalg.rotation import geodesic, small_rotation
from rotrl.linalg.spectrum import Basis, basis
from rotrl.linalg.tangent import tangent_projection

Variant = Callable[["Matrix", Generator], Tensor]
Decomposed = Callable[[str, Tensor], Basis]
T = TypeVar("T", Tensor, Basis)


def decompose(which: str, W: Tensor) -> Basis:
    """The basis of W, made anew."""
    return basis(W)


class Matrix:
    """W0 (m, n), D and the basis of W0, turned so that the rotation acts on the left. side: small | left | right.

    depth: where its layer lies in the model, 0 to 1. decomposed: gives the basis of "base" or "expert" in float64, from
    wherever it is kept; asked for only where a variant needs it.
    """

    def __init__(
        self, W0: Tensor, D: Tensor, side: str, depth: float = 0.0, decomposed: Decomposed = decompose
    ) -> None:
        self.depth = depth
        m, n = W0.shape
        self.flip = side == "right" or (side == "small" and m >= n)
        self.W0, self.D = (self._turned(M.double()) for M in (W0, D))
        self._decomposed = decomposed

    def update(self, variant: Variant, generator: Generator) -> Tensor:
        """The update of a variant, in the shape of the matrix."""
        if not self.D.any():
            return self._turned(self.D)
        return self._turned(variant(self, generator))

    @cached_property
    def frame(self) -> Basis:
        return self._turned(self._decomposed("base", self._turned(self.W0)))

    @cached_property
    def after(self) -> Basis:
        return self._turned(self._decomposed("expert", self._turned(self.W0 + self.D)))

    @cached_property
    def tangent(self) -> Tensor:
        return tangent_projection(self.frame, self.D, side="left")

    def _turned(self, M: T) -> T:
        return M.mT if self.flip else M


def nothing(x: Matrix, generator: Generator) -> Tensor:
    """The base."""
    return torch.zeros_like(x.D)


def whole(x: Matrix, generator: Generator) -> Tensor:
    """D itself."""
    return x.D


def tangent(x: Matrix, generator: Generator) -> Tensor:
    """P_T D, the first-order rotation."""
    return x.tangent


def complement(x: Matrix, generator: Generator) -> Tensor:
    """D - P_T D."""
    return x.D - x.tangent


def rotation(x: Matrix, generator: Generator) -> Tensor:
    """R W0 - W0 with the rotation R that explains D best."""
    return small_rotation(x.frame, x.D, side="left") @ x.W0 - x.W0


def random(x: Matrix, generator: Generator) -> Tensor:
    """A random rotation with the energy of P_T D in every plane: random senses, and outside the basis random planes."""
    U, _, V = x.frame
    image = x.tangent @ V
    T = U.mT @ image
    signs = _signs(T, generator).triu()
    turned = U @ (T * (signs + signs.triu(1).mT))
    if U.shape[0] > U.shape[1]:
        outside = image - U @ T
        drawn = normal(outside, generator)
        drawn = drawn - U @ (U.mT @ drawn)
        turned = turned + drawn * (outside.norm(dim=0) / drawn.norm(dim=0))
    return turned @ V.mT


def plane(x: Matrix, generator: Generator) -> Tensor:
    """D projected as P_T projects it, but with a random sense in every plane, at the energy of P_T D.

    F P_T F D with random signs F in the basis of the base: the same planes, one direction of each, the same weights
    on the entries of T, and no more of a rotation than of a stretch.
    """
    U, _, V = x.frame

    def signed(M: Tensor) -> Tensor:
        T = U.mT @ M @ V
        return M + U @ (T * (signs - 1)) @ V.mT

    signs = _signs(x.D.new_empty(len(x.frame.s), len(x.frame.s)), generator)
    kept = signed(tangent_projection(x.frame, signed(x.D), side="left"))
    found = kept.square().sum()
    return kept * (x.tangent.square().sum() / found).sqrt() if found > 0 else kept


def part(x: Matrix, generator: Generator) -> Tensor:
    """Random coordinates of D in the basis of the base, as many as hold the energy of P_T D: what any part keeps."""
    return random_part(x, float(x.tangent.square().sum() / x.D.square().sum()), generator)


def random_part(x: Matrix, share: float, generator: Generator) -> Tensor:
    """Random coordinates of D in the basis of the base, scaled to exactly `share` of its energy."""
    U, _, V = x.frame
    if U.shape[0] < V.shape[0]:  # the outer block is on the right
        image = U.mT @ x.D
        T = image @ V
        kept = U @ (T * _mask(T, share, generator)) @ V.mT
        kept = kept + U @ ((image - T @ V.mT) * _mask(T[:, :1], share, generator))
    else:
        image = x.D @ V
        T = U.mT @ image
        kept = U @ (T * _mask(T, share, generator)) @ V.mT
        kept = kept + ((image - U @ T) * _mask(T[:1], share, generator)) @ V.mT
    found = kept.square().sum()
    return kept * (share * x.D.square().sum() / found).sqrt() if found > 0 else kept


def scaled(x: Matrix, generator: Generator) -> Tensor:
    """The whole of D at the energy of P_T D."""
    return x.D * (x.tangent.square().sum() / x.D.square().sum()).sqrt()


def vectors(x: Matrix, generator: Generator) -> Tensor:
    """The expert's singular vectors with the base's singular values (arXiv 2607.19331)."""
    U, _, V = x.after
    return (U * x.frame.s) @ V.mT - x.W0


def vectors_control(x: Matrix, generator: Generator) -> Tensor:
    """As far from D as `vectors` is, but at r coordinates off the diagonal: they are taken out, or beyond."""
    taken = (x.D - vectors(x, generator)).norm()
    U, s, V = x.frame
    T = U.mT @ x.D @ V
    rows, columns = _elsewhere(len(s), generator)
    mark = torch.zeros_like(T)
    mark[rows, columns] = T[rows, columns]
    return x.D - U @ mark @ V.mT * (taken / mark.norm()) if mark.any() else x.D


def values(x: Matrix, generator: Generator) -> Tensor:
    """The base's singular vectors with the expert's singular values."""
    U, s, V = x.frame
    return (U * (x.after.s - s)) @ V.mT


def values_control(x: Matrix, generator: Generator) -> Tensor:
    """The same changes at r other coordinates, with the signs that D has there."""
    U, s, V = x.frame
    rows, columns = _elsewhere(len(s), generator)
    T = U.mT @ x.D @ V
    placed = torch.zeros_like(T)
    placed[rows, columns] = (x.after.s - s).abs() * T[rows, columns].sign()
    return U @ placed @ V.mT


def dose(t: float, *, rotated: bool) -> Variant:
    """W0 + t D, or R^t W0."""
    if not rotated:
        return lambda x, generator: t * x.D
    return lambda x, generator: geodesic(small_rotation(x.frame, x.D, side="left"), t) @ x.W0 - x.W0


SINGLE: dict[str, Variant] = {f.__name__: f for f in (tangent, complement, rotation, scaled)}
DRAWN: dict[str, Variant] = {f.__name__: f for f in (random, plane, part)}
SWAPS: dict[str, Variant] = {f.__name__: f for f in (vectors, vectors_control, values, values_control)}


def normal(like: Tensor, generator: Generator) -> Tensor:
    """Independent standard normal numbers."""
    return torch.empty_like(like).normal_(generator=generator)


def _signs(like: Tensor, generator: Generator) -> Tensor:
    return torch.empty_like(like).random_(0, 2, generator=generator) * 2 - 1


def _mask(like: Tensor, share: float, generator: Generator) -> Tensor:
    return (torch.empty_like(like).uniform_(generator=generator) < share).to(like)


def _elsewhere(r: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """One place in every row and column, none on the diagonal: a shift of a random order."""
    order = torch.randperm(r, generator=generator, device=generator.device)
    return order, order.roll(1)
