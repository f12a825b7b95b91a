"""Merges on the sphere of flattened tensors."""

import torch
from torch import Tensor

from rotrl.errors import NumericsError
from rotrl.merge.types import Pair


def slerp(base: Tensor, experts: Pair, *, t: float = 0.5) -> Tensor:
    """Spherical interpolation of two experts, each tensor as one vector, the lengths interpolated. Shoemake (1985).

    `u(t) = (sin((1-t) a) u_1 + sin(t a) u_2) / sin a`, W = ((1-t) |W_1| + t |W_2|) u(t). RL experts of one base lie
    1e-3 rad apart, so the angle is `2 atan2(|u_1 - u_2|, |u_1 + u_2|)`, exact there, and no threshold switches to the
    chord: both sines go to their limits. NumericsError where the experts point in opposite directions.
    """
    first, second = (expert.double() for expert in experts)
    lengths = first.norm(), second.norm()
    if not all(lengths):
        return (first + t * (second - first)).to(base)
    u, v = first / lengths[0], second / lengths[1]
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    if torch.pi - angle < 1e-6:
        raise NumericsError("the two experts point in opposite directions, no arc between them is shortest")
    sine = torch.sinc(angle / torch.pi)
    start, end = ((part * torch.sinc(part * angle / torch.pi) / sine) for part in (1 - t, t))
    return (((1 - t) * lengths[0] + t * lengths[1]) * (start * u + end * v)).to(base)
