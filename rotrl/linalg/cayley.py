"""The Cayley transform between skew matrices and rotations."""

import torch
from torch import Tensor

from rotrl.errors import NumericsError


def cayley(q: Tensor) -> Tensor:
    """Rotation `(I - Q)^{-1} (I + Q)` of a skew Q; an eigenvalue i q turns by the angle 2 atan(q).

    Shape (..., n, n). `Q = A / 2` gives exp(A) up to third order.
    """
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(identity - q, identity + q)


def inverse_cayley(r: Tensor) -> Tensor:
    """The skew `Q = (R + I)^{-1} (R - I)` whose Cayley transform is R; NumericsError where R has an eigenvalue -1.

    Shape (..., n, n).
    """
    if (torch.linalg.slogdet(r).sign <= 0).any():
        raise NumericsError("determinant -1: a reflection is no Cayley transform; use a larger anchor")
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    q, info = torch.linalg.solve_ex(r + identity, r - identity)
    # tan(angle / 2) has lost half its digits here.
    if info.any() or not (q.abs() < torch.finfo(r.dtype).eps ** -0.5).all():
        raise NumericsError("eigenvalue -1: a rotation by 180 degrees is no Cayley transform; use a larger anchor")
    return (q - q.mT) / 2
