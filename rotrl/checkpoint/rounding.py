"""The cast to the dtype that is written."""

import hashlib

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")


def cast(tensor: Tensor, dtype: torch.dtype, rounding: str, key: str) -> Tensor:
    """`tensor` in `dtype`: the nearest value, or one of the two neighbours with a probability that keeps the mean.

    Stochastic rounding (arXiv 2010.06192) goes to the farther neighbour with probability error over step. The draw
    is seeded by `key`: equal tensors of equal names round alike. Dtypes of 32 bits or more are not rounded.
    """
    nearest = tensor.to(dtype)
    if rounding == "nearest" or dtype.itemsize >= 4:
        return nearest
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device)
    exact = tensor.float()
    error = exact - nearest.float()
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, toward)
    step = (other.float() - nearest.float()).abs()
    moves = (error != 0) & other.isfinite() & (noise < error.abs() / step)
    return torch.where(moves, other, nearest)
