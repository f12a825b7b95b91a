"""The singular basis of a base matrix, an update seen in it, and what the update does to the spectrum.

W0 is (..., m, n), D = W1 - W0 its update, W0 = U diag(s) V^T with r = min(m, n). T = U^T D V in the full bases is
(m, n); only its leading (r, r) block and the energies of the rest are kept, so the larger full basis is never formed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["left", "right"]


class Basis(NamedTuple):
    """Thin singular basis: U (..., m, r), s (..., r) descending, V (..., n, r), float64."""

    U: Tensor
    s: Tensor
    V: Tensor

    @property
    def mT(self) -> Basis:
        """The basis of the transposed matrix."""
        return Basis(self.V, self.s, self.U)


class Coordinates(NamedTuple):
    """An update in the basis of its base.

    s (..., r), T (..., r, r), below (..., r): energy of column j of T in the rows i > r, beside (..., r): energy of
    row i of T in the columns j > r, energy (...): ||D||^2, shape: (m, n). One of below and beside is always zero;
    outside (..., r, r), where it is kept, is the Gram matrix of the other one's block, which has that diagonal.
    """

    s: Tensor
    T: Tensor
    below: Tensor
    beside: Tensor
    energy: Tensor
    shape: tuple[int, int]
    outside: Tensor | None = None

    @property
    def mT(self) -> Coordinates:
        """The coordinates of the transposed update."""
        m, n = self.shape
        return Coordinates(self.s, self.T.mT, self.beside, self.below, self.energy, (n, m), self.outside)


def basis(W0: Tensor | Basis, dtype: torch.dtype = torch.float64) -> Basis:
    """Thin SVD; singular values below max(m, n) eps s_1 count as 0 (numerical rank).

    On a GPU by `gram_basis`: its Jacobi SVD of a matrix of some thousand rows takes seconds.
    """
    if isinstance(W0, Basis):
        return W0
    if W0.is_cuda:
        found = gram_basis(W0)
        return Basis(*(part.to(dtype) for part in found))
    if W0.shape[-2] < W0.shape[-1]:  # LAPACK takes twice as long for a wide matrix as for a tall one
        return basis(W0.mT, dtype).mT
    U, s, Vh = torch.linalg.svd(W0.to(dtype), full_matrices=False)
    return Basis(U, _ranked(s, W0.shape), Vh.mT)


def gram_basis(W0: Tensor) -> Basis:
    """The same in float64 from the smaller Gram matrix G = W0^T W0 = V diag(s^2) V^T and W0 V = Q R.

    U = Q and s = |diag R|: Q is orthonormal whatever the rank, and what W0 lacks of U diag(s) V^T, R beside its
    diagonal, is about 1e-16 s_1^2 / s_i in row i.
    """
    if W0.shape[-2] < W0.shape[-1]:
        return gram_basis(W0.mT).mT
    W = W0.double()
    V = torch.linalg.eigh(W.mT @ W).eigenvectors.flip(-1)
    Q, R = torch.linalg.qr(W @ V)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    s, order = diagonal.abs().sort(dim=-1, descending=True)
    signed = Q * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
    U, V = (M.gather(-1, order.unsqueeze(-2).expand_as(M)) for M in (signed, V))
    return Basis(U, _ranked(s, W0.shape), V)


def _ranked(s: Tensor, shape: tuple[int, ...]) -> Tensor:
    cut = max(shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
    return torch.where(s > cut, s, 0.0)


def coordinates(W0: Tensor | Basis, D: Tensor) -> Coordinates:
    """D (..., m, n) in the singular basis of W0 (see Coordinates); a Basis in place of W0 saves the SVD."""
    U, s, V = basis(W0)
    D = D.to(s.dtype)
    m, n = D.shape[-2:]
    if m < n:
        return coordinates(Basis(V, s, U), D.mT).mT
    image = D @ V
    T = U.mT @ image
    outside = image.mT @ image - T.mT @ T if m > n else torch.zeros_like(T)
    below = outside.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    nothing = torch.zeros_like(s)
    return Coordinates(s, T, below, nothing.expand_as(below), D.square().sum((-2, -1)), (m, n), outside)


class Moved(NamedTuple):
    """The base after the update: s (..., r) descending and, in the basis of the base, its top-k singular vectors.

    left and right are (..., rows, k), to be compared with the first k unit vectors.
    """

    s: Tensor
    left: Tensor
    right: Tensor


def moved(c: Coordinates, k: int) -> Moved:
    """The SVD of W0 + D from the coordinates of D: an eigenproblem of size r, in float64, whatever max(m, n) is.

    With M = diag(s) + T, W1^T W1 is M^T M + outside in the basis of the base. A singular value s_i is off by
    1e-16 s_1^2 / s_i. Rows of W1's left vectors beyond r are rotated among themselves into k, which no angle sees.
    """
    m, n = c.shape
    if m < n:
        s, left, right = moved(c.mT, k)
        return Moved(s, right, left)
    M = (c.T + torch.diag_embed(c.s.expand(c.T.shape[:-1]))).double()
    outside = _outside(c).double()
    squares, vectors = torch.linalg.eigh(M.mT @ M + outside)
    s, right = squares.clamp_min(0.0).sqrt().flip(-1), vectors.flip(-1)[..., :k]
    scaled = right * torch.where(s > 0, 1 / s, 0.0)[..., None, :k]
    energies, axes = torch.linalg.eigh(scaled.mT @ outside @ scaled)
    beyond = energies.clamp_min(0.0).sqrt().unsqueeze(-1) * axes.mT
    return Moved(s, torch.cat([M @ scaled, beyond], -2), right)


def leading_angles(Y: Tensor) -> Tensor:
    """Angles in radians, ascending, between the span of the orthonormal columns Y (..., d, k) and the first k units.

    `principal_angles` by one eigenproblem of size k in place of two SVDs: off by 1e-8 of the largest angle, and of 1.
    """
    beyond = Y[..., Y.shape[-1] :, :]
    sine = torch.linalg.eigvalsh(beyond.mT @ beyond).clamp(0.0, 1.0)
    return torch.atan2(sine.sqrt(), (1 - sine).sqrt())


def _outside(c: Coordinates) -> Tensor:
    if c.outside is None:
        raise ValueError("these coordinates keep no Gram matrix of their outer block; take them from `coordinates`")
    return c.outside


def nu(after: Tensor, c: Coordinates) -> Tensor:
    """||s(W1) - s(W0)|| sqrt(max(m, n)) / ||D|| from the singular values: 1 for a small random D, 0 for a rotation."""
    return torch.linalg.vector_norm(after - c.s, dim=-1) * max(c.shape) ** 0.5 / c.energy.sqrt()


def nss(before: Tensor, after: Tensor) -> Tensor:
    """Normalised spectral shift ||s(W1) - s(W0)|| / ||s(W0)|| (arXiv 2511.08567): above all the size of D."""
    return torch.linalg.vector_norm(after - before, dim=-1) / torch.linalg.vector_norm(before, dim=-1)


def rho(c: Coordinates) -> Tensor:
    """-2 <W0, D> / ||D||^2: 1 for every norm-preserving update, 0 for a random one. Weight decay confounds it."""
    return -2 * _inner(c) / c.energy


def along_base(c: Coordinates) -> Tensor:
    """<W0, D>^2 / (||W0||^2 ||D||^2), the share of ||D||^2 that a multiple of W0 explains: what weight decay does."""
    return _inner(c).square() / (c.s.square().sum(-1) * c.energy)


def _inner(c: Coordinates) -> Tensor:
    return (c.s * c.T.diagonal(dim1=-2, dim2=-1)).sum(-1)


def gram_drift(c: Coordinates, *, side: Side) -> Tensor:
    """||W1^T W1 - W0^T W0||^2 (left) or ||W1 W1^T - W0 W0^T||^2 (right) over its mean under sign flips of T.

    c are the coordinates of D. 0 for a finite rotation on that side, 1 for random D, above 1 for a stretch.
    """
    if side == "right":
        return gram_drift(c.mT, side="left")
    m, n = c.shape
    outside = _outside(c)
    if n <= m:  # S T + T^T S + T^T T, and what lies beyond the rows of the basis
        first = c.s.unsqueeze(-1) * c.T
        drift = (first + first.mT + c.T.mT @ c.T + outside).square().sum((-2, -1))
    else:  # three blocks of W1^T W1 - W0^T W0: within the basis, beside it (twice), beyond it
        M = c.T + torch.diag_embed(c.s.expand(c.T.shape[:-1]))
        first = c.s.unsqueeze(-1) * c.T
        within = (first + first.mT + c.T.mT @ c.T).square().sum((-2, -1))
        beside = (M * (outside @ M)).sum((-2, -1))
        drift = within + 2 * beside + outside.square().sum((-2, -1))
    return drift / _mean_gram_drift(c)


def _mean_gram_drift(c: Coordinates) -> Tensor:
    """E ||S^T T + T^T S + T^T T||^2 over independent signs of T.

    = 2 sum s_i^2 T_ij^2 (twice on the diagonal) + sum_j col_j^2 + sum_i row_i^2 - sum T_ij^4, where col and row are the
    energies of T's columns and rows. Exact for square matrices; the free block counts as evenly spread.
    """
    C, s2, r = c.T.square(), c.s.square(), c.s.shape[-1]
    m, n = c.shape
    first = 2 * ((C.sum(-1) + C.diagonal(dim1=-2, dim2=-1) + c.beside) * s2).sum(-1)
    second = (C.sum(-2) + c.below).square().sum(-1) + (C.sum(-1) + c.beside).square().sum(-1) - C.square().sum((-2, -1))
    for block, extent in ((c.below, m - r), (c.beside, n - r)):
        if extent:
            second = second + (block.sum(-1).square() - block.square().sum(-1)) / extent
    return first + second


def principal_angles(X: Tensor, Y: Tensor) -> Tensor:
    """Angles in radians, ascending, between the spans of the orthonormal columns X and Y (..., d, k).

    Small ones from sines, large ones from cosines: either alone loses half the digits (Bjorck and Golub 1973).
    """
    overlap = X.mT @ Y
    cosine = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sine = torch.linalg.svdvals(Y - X @ overlap).flip(-1).clamp(max=1.0)
    return torch.where(cosine.square() > 0.5, torch.arcsin(sine), torch.arccos(cosine))
