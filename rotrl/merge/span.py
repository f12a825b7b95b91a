"""Merges of very tall matrices in a basis of what the columns of all models span, so that embeddings fit in memory.

An equivariant method has f(Q W0, Q W_1, ...) = Q f(W0, W_1, ...) for every Q with orthonormal columns. The Gram matrix
of A = [W0, d_1, ..., d_T] (m, p), p = (T + 1) n, gives such a Q = A B^-1 with B (p, p). The method merges B's columns,
which are as high as p, and the merge is `W0 + A B^-1 (f - B_0)`: only sums over rows and products by rows touch the
longer side. In float64, but for these products.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.merge.linear import weighted_sum
from rotrl.merge.summary import Pieces

TALL = 6  # rows over columns from which on the basis of a few experts is lower than the matrix: that of embeddings
ROWS = 2048  # of a product of float64 at a time
INDEPENDENT = 1e-4  # least part of a column beside those before it, above which Cholesky's factor has enough digits


def in_their_span(
    function: Callable[..., Tensor], pieces: Pieces, beside: Mapping[str, Iterable[Tensor]]
) -> Callable[..., Tensor]:
    """An equivariant `function` for each of the pieces, which hold rows of very tall matrices.

    `beside` are further matrices of the same shape, by the function's keywords, in the same pieces.
    """
    coefficients: list[Tensor] = []

    def merged(base: Tensor, experts: Sequence[Tensor], **hyper: Any) -> Tensor:
        parts = _parts(base, [*experts, *(hyper[key] for key in beside)])
        if not coefficients:
            stacks = (
                torch.cat(_parts(w0, [*ws, *more]), 1) for (w0, ws), *more in zip(pieces, *beside.values(), strict=True)
            )
            coefficients.extend(c.to(base) for c in _coefficients(function, stacks, len(experts), list(beside), hyper))
        return base + weighted_sum([part @ c for part, c in zip(parts, coefficients, strict=True)])

    return merged


def _parts(base: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    return [base, *(other - base for other in others)]


def _coefficients(
    function: Callable[..., Tensor], stacks: Iterable[Tensor], experts: int, beside: list[str], hyper: dict[str, Any]
) -> Sequence[Tensor]:
    """C_j (n, n) of the merge `W0 + sum_j A_j C_j`, A_j the columns of W0 and of the updates."""
    count = 1 + experts + len(beside)
    gram = _gram(stacks, count)
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    gram *= inverse[:, None] * inverse
    factor, backward = _root(gram)
    w0, *updates = (part.contiguous() for part in (factor * lengths).chunk(count, 1))
    models = [w0 + d for d in updates]
    hyper = {**hyper, **dict(zip(beside, models[experts:], strict=True))}
    return (inverse[:, None] * backward(function(w0, models[:experts], **hyper) - w0)).chunk(count)


def _gram(stacks: Iterable[Tensor], count: int) -> Tensor:
    """`A^T A`, its upper triangle of blocks."""
    gram = None
    for rows in _blocks(stacks):
        if gram is None:
            gram = rows.new_zeros(rows.shape[1], rows.shape[1])
        width = len(gram) // count
        for at in range(0, len(gram), width):
            gram[at : at + width, at:] += rows[:, at : at + width].mT @ rows[:, at:]
    assert gram is not None
    if not gram.diagonal().isfinite().all():
        raise NumericsError("NaN or Inf in the weights; use checkpoints with finite weights")
    return gram


def _blocks(stacks: Iterable[Tensor]) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for stack in stacks:
        held.append(stack)
        if sum(map(len, held)) >= ROWS:
            yield torch.cat(held).double()
            held = []
    if held:
        yield torch.cat(held).double()


def _root(gram: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """B with `B^T B` the matrix of unit diagonal whose upper triangle is given, and the product with B^-1.

    Dependent columns leave rows of zeros in B, and zeros in the pseudoinverse.
    """
    triangle, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if not failed and triangle.diagonal().min() > INDEPENDENT:
        return triangle, lambda x: torch.linalg.solve_triangular(triangle, x, upper=True)
    energies, vectors = torch.linalg.eigh(gram, UPLO="U")
    present = energies > len(gram) * torch.finfo(gram.dtype).eps * energies[-1]
    root = energies.clamp(min=0).sqrt() * present
    inverse = torch.where(present, 1 / root, 0.0)
    return root[:, None] * vectors.mT, lambda x: vectors @ (inverse[:, None] * x)
