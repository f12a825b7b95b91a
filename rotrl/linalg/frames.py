"""Thin frames: rotations of the long side of a matrix, of which no matrix of that size is ever formed.

A tall W (m, n), n <= m, is `Q P`: Q (m, n) of orthonormal columns, a frame, and `P = (W^T W)^(1/2)`. A rotation R of
its rows takes Q to another frame Q' and W to Q' P. Of all R that do so, the one nearest to I moves the span of both
alone: with `C = Q^T Q' = U (C^T C)^(1/2)` and `E = Q' - Q C`

    R = I + [Q, E] [[C - I, -U], [I, -(I + (C^T C)^(1/2))^{-1}]] [Q, E]^T.

It is also the Procrustes rotation of Q to Q' that is nearest to I.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotrl.linalg.procrustes import polar, singular
from rotrl.linalg.rotation import angles, geodesic


def polar_factors(w: Tensor) -> tuple[Tensor, Tensor]:
    """Q and P of `W = Q P`, W of shape (..., m, n), n <= m; where W lacks rank Q is completed arbitrarily."""
    u, s, vh = singular(w)
    return u @ vh, (vh.mT * s[..., None, :]) @ vh


def smallest_turn(frame: Tensor, other: Tensor) -> Tensor:
    """The orthogonal R (m, m) nearest to I that takes the one frame (m, n) to the other. Its determinant is -1 where
    the frames are so far apart that det(Q^T Q') < 0."""
    c = frame.mT @ other
    u, n = polar(c), c.shape[-1]
    eye = torch.eye(n).to(c)
    cosines = u.mT @ c
    beyond = torch.linalg.inv(eye + (cosines + cosines.mT) / 2)
    middle = torch.cat([torch.cat([c - eye, -u], -1), torch.cat([eye, -beyond], -1)], -2)
    f = torch.cat([frame, other - frame @ c], -1)
    return torch.eye(f.shape[-2]).to(f) + f @ middle @ f.mT


def spanned(frame: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A basis J (m, j) of all frames, j <= m, and R (j, j) of each of the others: `I + J (R - I) J^T` goes there."""
    basis = torch.linalg.qr(torch.cat([frame, *others], -1))[0]
    start = basis.mT @ frame
    return basis, [smallest_turn(start, basis.mT @ other) for other in others]


def towards(w: Tensor, frame: Tensor, t: float) -> Tensor:
    """`R^t W` with the smallest R that takes the frame of W to the given one; `Q' P` at t = 1. Raises like `log`."""
    q, p = polar_factors(w)
    if t == 1:
        return frame @ p
    basis, (r,) = spanned(q, [frame])
    return basis @ (geodesic(r, t) @ (basis.mT @ q)) @ p


def frame_angles(w: Tensor, frame: Tensor) -> Tensor:
    """The angles (..., m) in radians of the smallest rotation that takes the frame of W to the given one."""
    _, (r,) = spanned(polar_factors(w)[0], [frame])
    found = angles(r)
    return torch.cat([found, found.new_zeros(*found.shape[:-1], w.shape[-2] - found.shape[-1])], -1)
