"""Weights between the base and an expert: the parts of an update, each beside what costs the same energy.

A variant is a function of one matrix (the base's singular basis, W0, the update D) that gives the update to apply in
place of D. All work on the small side of the matrix: the one on which few directions are rotations (of the tall
matrices of an MLP the larger side's rotations hold 91 % of any update), or the side that is asked for.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Generator, Tensor

from rotrl.linalg.rotation import geodesic, small_rotation
from rotrl.linalg.spectrum import Basis, basis
from rotrl.linalg.tangent import tangent_projection

Variant = Callable[["Matrix", Generator], Tensor]


class Matrix:
    """W0 (m, n), D and the basis of W0, turned so that the rotation acts on the left. side: small | left | right.

    depth: where its layer lies in the model, 0 to 1.
    """

    def __init__(self, frame: Basis, W0: Tensor, D: Tensor, side: str, depth: float = 0.0) -> None:
        self.depth = depth
        m, n = W0.shape
        self.flip = side == "right" or (side == "small" and m >= n)
        self.frame = frame.mT if self.flip else frame
        self.W0, self.D = (M.mT.double() if self.flip else M.double() for M in (W0, D))

    def update(self, variant: Variant, generator: Generator) -> Tensor:
        """The update of a variant, in the shape of the matrix."""
        if not self.D.any():
            return self.D.mT if self.flip else self.D
        change = variant(self, generator)
        return change.mT if self.flip else change

    @cached_property
    def tangent(self) -> Tensor:
        return tangent_projection(self.frame, self.D, side="left")

    @cached_property
    def after(self) -> Basis:
        return basis(self.W0 + self.D)


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
        drawn = torch.randn(outside.shape, generator=generator, dtype=outside.dtype)
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
    U, s, V = x.frame
    if U.shape[0] < V.shape[0]:  # the outer block is on the right
        image = U.mT @ x.D
        T = image @ V
        kept = U @ (T * _mask(T.shape, share, generator)) @ V.mT
        kept = kept + U @ ((image - T @ V.mT) * _mask((len(s), 1), share, generator))
    else:
        image = x.D @ V
        T = U.mT @ image
        kept = U @ (T * _mask(T.shape, share, generator)) @ V.mT
        kept = kept + ((image - U @ T) * _mask((1, len(s)), share, generator)) @ V.mT
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


def _signs(like: Tensor, generator: Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1


def _mask(shape: tuple[int, ...], share: float, generator: Generator) -> Tensor:
    return (torch.rand(shape, generator=generator, dtype=torch.float64) < share).double()


def _elsewhere(r: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """One place in every row and column, none on the diagonal: a shift of a random order."""
    order = torch.randperm(r, generator=generator)
    return order, order.roll(1)
