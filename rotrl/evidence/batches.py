"""Matrices of one shape go through the kernels together, as many at a time as memory has room for.

On the CPU this saves the overhead of many small calls (the matrices of a tiny model, keys and values of a large one)
and large matrices stay alone; on a GPU whole stacks of layers fit, and fill it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

CPU_BYTES = 1 << 28  # beyond what caches hold a batch on the CPU gains nothing
GPU_SHARE = 0.8  # of the memory that is free when the first batch is cut


def batches(
    shapes: Mapping[str, Sequence[int]], *, updates: int, dtype: torch.dtype, device: str, batch: int | str = "auto"
) -> Iterator[list[str]]:
    """The names of the matrices, one shape at a time. batch: `auto`, or how many of any shape."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(tuple(shape), []).append(name)
    room = free_bytes(device)
    for shape, names in groups.items():
        size = max(1, room // matrix_bytes(shape, updates, dtype)) if batch == "auto" else int(batch)
        yield from (names[i : i + size] for i in range(0, len(names), size))


def free_bytes(device: str) -> int:
    """What batches may take."""
    if torch.device(device).type != "cuda":
        return CPU_BYTES
    # What torch keeps of freed tensors is not free to the driver, and is to torch.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + kept))


def matrix_bytes(shape: Sequence[int], updates: int, dtype: torch.dtype) -> int:
    """What `measure` holds at most for one matrix (m, n) of a batch and its updates, with all controls.

    Whole matrices: one side of the basis, each update, a control, its image and its square; of the smaller side:
    each update's coordinates, and what one eigenproblem in float64 takes.
    """
    r, entries = min(shape), math.prod(shape)
    return dtype.itemsize * entries * (7 + 2 * updates) + 8 * r * r * (14 + 2 * updates)
