"""The orthogonal matrix nearest to a map: polar factor and orthogonal Procrustes."""

import torch
from torch import Tensor

from rotrl.errors import NumericsError


def polar(m: Tensor) -> Tensor:
    """Orthogonal polar factor U V^T of `m = U diag(s) V^T`, the nearest matrix with orthonormal columns (or rows).

    Shape (..., rows, cols). Where `m` is rank-deficient the completion is arbitrary. NumericsError on NaN or Inf.
    """
    u, _, vh = singular(m)
    return _polish(u @ vh)


def procrustes(source: Tensor, target: Tensor, *, side: str, anchor: float = 0.0) -> Tensor:
    """The R in O(n) that minimises `|source R - target|` (right) or `|R source - target|` (left), Frobenius norm.

    Right: `R = polar(S^T T + mu I)`, which is the minimiser of `|S R - T|^2 + mu |R - I|^2`; left likewise on the
    transposes. `mu = anchor * |S|^2 / min(m, n)`: the anchor is relative to the mean squared singular value of S.
    With anchor 0 the limit mu -> 0: R is the minimiser nearest to I, so the identity on a common null space.
    Source and target have shape (..., m, n). Computed in float64, since S^T T squares the condition number; returned
    in the input's dtype. Its determinant may be -1 where the update exceeds the smallest singular values: on square
    random 96 x 96 matrices with an update of 6.5 % of the norm in 22 of 100 with anchor 0, in none with 0.001.
    """
    if side == "left":
        return procrustes(source.mT, target.mT, side="right", anchor=anchor).mT.contiguous()
    if side != "right":
        raise ValueError(f"side is 'left' or 'right', not {side!r}")
    s, t = source.double(), target.double()
    mu = anchor * s.square().sum((-2, -1)) / min(s.shape[-2:])
    return nearest(s.mT @ t + torch.diag_embed(mu[..., None].expand(*mu.shape, s.shape[-1]))).to(source)


def nearest(m: Tensor) -> Tensor:
    """The R in O(n) that maximises `tr(R^T m)`: polar(m), on a null space of m the one nearest to I."""
    u, values, vh = singular(m)
    floor = values[..., :1] * max(m.shape[-2:]) * torch.finfo(m.dtype).eps
    null = (values <= floor).to(m)[..., None, :]
    # On the null space every completion is a minimiser; the one nearest to I is the polar factor of the overlap of
    # the two null spaces, which both projectors together give without knowing their dimension.
    overlap = (u * null) @ u.mT @ (vh.mT * null) @ vh
    return polar((u * (1 - null)) @ vh + overlap) if null.any() else _polish(u @ vh)


def singular(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V^T of the thin singular value decomposition. NumericsError on NaN or Inf."""
    if not m.isfinite().all():
        raise NumericsError("NaN or Inf in a matrix whose singular values are needed; check the weights")
    try:
        return torch.linalg.svd(m, full_matrices=False)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        pass  # LAPACK's divide and conquer does not converge on some matrices, and mostly does on the transposes
    try:
        u, s, vh = torch.linalg.svd(m.mT, full_matrices=False)
        return vh.mT, s, u.mT
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericsError(f"the singular value decomposition failed ({error}); check the weights") from error


def _polish(q: Tensor) -> Tensor:
    """One Newton-Schulz step: an SVD leaves float32 factors orthogonal to 4e-6 only."""
    if q.shape[-2] < q.shape[-1]:
        return _polish(q.mT).mT
    return 1.5 * q - 0.5 * q @ (q.mT @ q)
