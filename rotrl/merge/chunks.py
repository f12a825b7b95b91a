"""A tensor of base and experts in pieces of rows that fit a processor's cache.

Work on pieces is both what keeps memory small, whatever the tensor's size, and several times faster than work on whole
tensors, whose every temporary goes through the main memory. Pieces depend on the shape alone, never on sharding.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rotrl.errors import NumericsError

ENTRIES = 1 << 18

Piece = tuple[Tensor, list[Tensor]]


def rows_of(shape: Sequence[int], step: int = 1) -> int:
    """How many rows, a multiple of `step`, have about ENTRIES entries."""
    rows = ENTRIES // max(1, math.prod(shape[1:]))
    return max(step, rows - rows % step)


class Chunks(Sequence[Piece]):
    """Base and experts in consecutive pieces of `rows` rows (None: whole), in `dtype` when asked for.

    On `device`. NumericsError where a piece holds NaN or Inf, if `checked`, when it is first asked for.
    """

    def __init__(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        rows: int | None,
        checked: bool = True,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.models, self.device, self.dtype = (base, *experts), device, dtype
        self.rows = rows or (len(base) if base.ndim else 1)
        self._unchecked = set(range(len(self))) if checked else set()

    def __len__(self) -> int:
        return max(1, -(-len(self.models[0]) // max(1, self.rows))) if self.models[0].ndim else 1

    def __getitem__(self, index: int) -> Piece:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = slice(index * self.rows, (index + 1) * self.rows) if self.models[0].ndim else ...
        # One call for both would convert on the CPU first, and copy twice the bytes of bfloat16.
        base, *experts = (model[rows].to(self.device).to(self.dtype) for model in self.models)
        if index in self._unchecked:
            if not finite(base, *experts):
                raise NumericsError("NaN or Inf in the weights; use checkpoints with finite weights")
            self._unchecked.remove(index)
        return base, experts

    def __iter__(self) -> Iterator[Piece]:
        return (self[index] for index in range(len(self)))


def finite(*tensors: Tensor) -> bool:
    """Whether all values of tensors of one shape are finite: by inner products of two tensors each.

    No NaN or Inf gets lost in a product or sum, and this takes a fraction of isfinite on every entry. Where a product
    overflows the extremes tell.
    """
    flat = [tensor.flatten() for tensor in tensors]
    if all(math.isfinite(float(torch.dot(a, b))) for a, b in zip(flat[::2], [*flat[1::2], flat[-1]], strict=False)):
        return True
    return all(not x.numel() or all(bool(bound.isfinite()) for bound in x.aminmax()) for x in flat)


def keep_freed_memory() -> None:
    """Has glibc reuse the buffers of pieces, which it otherwise gives back and takes, page by page, in every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 64 * ENTRIES)
        mallopt(m_trim_threshold, 512 * ENTRIES)
