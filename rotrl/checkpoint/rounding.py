"""The cast to the dtype that is written."""

import hashlib

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")
PIECE = 1 << 24  # values at a time: half a dozen float32 copies of an embedding would be more than the merge itself


def cast(tensor: Tensor, dtype: torch.dtype, rounding: str, key: str) -> Tensor:
    """`tensor` in `dtype`: the nearest value, or one of the two neighbours with a probability that keeps the mean.

    Stochastic rounding (arXiv 2010.06192) goes to the farther neighbour with probability error over step. The draw
    is seeded by `key`: equal tensors of equal names round alike. Dtypes of 32 bits or more are not rounded.
    """
    if rounding == "nearest" or dtype.itemsize >= 4:
        return (_to_odd(tensor) if tensor.dtype == torch.float64 and dtype.itemsize == 2 else tensor).to(dtype)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    pieces = tensor.float().reshape(-1).split(PIECE)
    return torch.cat([_drawn(piece, dtype, generator) for piece in pieces]).reshape(tensor.shape)


def _to_odd(exact: Tensor) -> Tensor:
    """float32 towards 0, its last bit set where anything is lost: from there to 16 bits nothing is rounded twice.

    torch converts through the nearest float32, which moves values beside a midpoint onto it. Boldo, Melquiond (2008).
    """
    near = exact.float()
    beyond = near.double().abs() > exact.abs()
    below = torch.where(beyond, torch.nextafter(near, torch.zeros_like(near)), near)
    lost = (below.double() != exact) & exact.isfinite()
    return (below.view(torch.int32) | lost.int()).view(torch.float32)


def _drawn(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    share = error.abs() / (other.float() - nearest.float()).abs()
    draw = torch.rand(exact.shape, generator=generator).to(exact.device)
    return torch.where((error != 0) & other.isfinite() & (draw < share), other, nearest)
