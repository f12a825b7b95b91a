"""Rotations and their generators: exponential, logarithm, geodesic, angles; small rotations from a delta."""

import torch
from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.linalg.cayley import cayley
from rotrl.linalg.procrustes import polar
from rotrl.linalg.spectrum import Basis, Side
from rotrl.linalg.tangent import generator


def exp(a: Tensor) -> Tensor:
    """Rotation exp(A) of the skew generator A, shape (..., n, n). Not for autograd: the planes of A come in pairs.

    `exp A = cos(T) + A sinc(T)` with `T = (-A^2)^(1/2)`, both smooth in the symmetric A^2. Equivalent to
    `scipy.linalg.expm`; torch.linalg.matrix_exp is off by 2e-10 in float64 at angles about 0.05
    (pytorch issue 196592).
    """
    squares, vectors = _eigh(a @ a)
    turns = (-squares).clamp(min=0).sqrt()
    cosine = (vectors * turns.cos()[..., None, :]) @ vectors.mT
    return cosine + a @ (vectors * torch.sinc(turns / torch.pi)[..., None, :]) @ vectors.mT


def log(r: Tensor) -> Tensor:
    """Principal logarithm: the skew A of least norm with exp(A) = R. Shape (..., n, n).

    `log R = K g(S)` with `K = (R - R^T)/2`, `S = (R + R^T)/2` (which commute, R is normal) and
    `g(cos a) = a / sin a`, smooth but for a = pi. Equivalent to `scipy.linalg.logm`, batched.
    Raises NumericsError on determinant -1 and on an eigenvalue -1 (an angle of 180 degrees has two logarithms).
    """
    cosines, vectors = _eigh((r + r.mT) / 2)
    if (torch.linalg.slogdet(r).sign <= 0).any():
        raise NumericsError("determinant -1: a reflection has no logarithm; use a larger anchor")
    if (cosines < -1 + 100 * torch.finfo(r.dtype).eps).any():
        raise NumericsError("eigenvalue -1: a rotation by 180 degrees has no unique logarithm; use a larger anchor")
    if (cosines < 0).any():  # cosines lose half the digits near 180 degrees, the root R^(1/2) = polar(I + R) does not
        return 2 * log(polar(r + torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)))
    scale = 1 / torch.sinc(cosines.clamp(max=1).acos() / torch.pi)
    a = (r - r.mT) / 2 @ (vectors * scale[..., None, :]) @ vectors.mT
    return (a - a.mT) / 2


def geodesic(r: Tensor, t: float) -> Tensor:
    """Rotation `exp(t log R)` at the part t of the way from I to R. Raises like `log`."""
    return exp(t * log(r))


def angles(r: Tensor) -> Tensor:
    """Rotation angles in radians, descending, n of them: the angle of each plane stands twice. Shape (..., n).

    `a = 2 asin(s/2)` for the singular values s of R - I: exact for small angles, where acos is not.
    """
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return 2 * (torch.linalg.svdvals(r - identity) / 2).clamp(max=1).asin()


def orthogonality_error(r: Tensor) -> Tensor:
    """Largest entry of |R^T R - I| for columns that should be orthonormal; one number per matrix of the batch."""
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return (r.mT @ r - identity).abs().amax((-2, -1))


def small_rotation(W0: Tensor | Basis, D: Tensor, *, side: Side) -> Tensor:
    """Rotation that explains the small update D of W0 best, from D itself: `cayley(A / 2)` in float64.

    Right: A solves `G A + A G = W0^T D - D^T W0`, `G = W0^T W0`, the stationarity of `|W0 A - D|` over skew A
    (`tangent.generator`). Agrees with `procrustes(W0, W0 + D)` to second order in D, is always a rotation, and needs
    no `W0^T W1`, in which float32 loses a small D. W0 and D have shape (..., m, n); a cached `Basis` serves for W0.
    """
    return cayley(generator(W0, D, side=side) / 2)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    if not symmetric.isfinite().all():
        raise NumericsError("NaN or Inf in a rotation or its generator; run the alignment again")
    return torch.linalg.eigh(symmetric)
