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
    row i of T in the columns j > r, energy (...): ||D||^2, shape: (m, n). One of below and beside is always zero.
    """

    s: Tensor
    T: Tensor
    below: Tensor
    beside: Tensor
    energy: Tensor
    shape: tuple[int, int]

    @property
    def mT(self) -> Coordinates:
        """The coordinates of the transposed update."""
        m, n = self.shape
        return Coordinates(self.s, self.T.mT, self.beside, self.below, self.energy, (n, m))


def basis(W0: Tensor | Basis) -> Basis:
    """Thin SVD in float64; singular values below max(m, n) eps s_1 count as 0 (numerical rank)."""
    if isinstance(W0, Basis):
        return W0
    U, s, Vh = torch.linalg.svd(W0.double(), full_matrices=False)
    cut = max(W0.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
    return Basis(U, torch.where(s > cut, s, 0.0), Vh.mT)


def coordinates(W0: Tensor | Basis, D: Tensor) -> Coordinates:
    """D (..., m, n) in the singular basis of W0 (see Coordinates); a Basis in place of W0 saves the SVD."""
    U, s, V = basis(W0)
    D = D.double()
    m, n = D.shape[-2:]
    energy = D.square().sum((-2, -1))
    if m >= n:
        image = D @ V
        T = U.mT @ image
        below = (image.square().sum(-2) - T.square().sum(-2)).clamp_min(0.0) if m > n else torch.zeros_like(s)
        return Coordinates(s, T, below, torch.zeros_like(s), energy, (m, n))
    return coordinates(Basis(V, s, U), D.mT).mT


def nu(W0: Tensor, D: Tensor) -> Tensor:
    """||s(W1) - s(W0)|| sqrt(max(m, n)) / ||D||: 1 for a small random D, 0 for a rotation."""
    return _shift(W0, D) * max(D.shape[-2:]) ** 0.5 / torch.linalg.matrix_norm(D.double())


def nss(W0: Tensor, D: Tensor) -> Tensor:
    """Normalised spectral shift ||s(W1) - s(W0)|| / ||s(W0)|| (arXiv 2511.08567). Measures the size of D above all."""
    return _shift(W0, D) / torch.linalg.matrix_norm(W0.double())


def _shift(W0: Tensor, D: Tensor) -> Tensor:
    before = torch.linalg.svdvals(W0.double())
    return torch.linalg.vector_norm(torch.linalg.svdvals(W0.double() + D.double()) - before, dim=-1)


def rho(W0: Tensor, D: Tensor) -> Tensor:
    """-2 <W0, D> / ||D||^2: 1 for every norm-preserving update, 0 for a random one. Weight decay confounds it."""
    W0, D = W0.double(), D.double()
    return -2 * (W0 * D).sum((-2, -1)) / D.square().sum((-2, -1))
