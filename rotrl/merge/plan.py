"""What a merge will do, from the headers of its models alone."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from rotrl.checkpoint.family import notes as header_notes
from rotrl.checkpoint.header import word_of
from rotrl.checkpoint.layout import MATRICES, Role, role_of
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.checkpoint.rotations import RotationsFile, open_rotations
from rotrl.errors import ConfigError
from rotrl.merge.method import Method
from rotrl.merge.rotation import how

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan_merge(
    base: Checkpoint, experts: Mapping[str, Checkpoint], method: Method, *, dtype: str = "auto"
) -> dict[str, Any]:
    """What a merge will do, by headers: tensors by role, bytes, scale (None without), passes, peak memory, warnings.

    `rotations` maps how a matrix is turned, in words, to the modules that are; `given` says what files hold.
    """
    check_family(base, experts)
    roles = {name: role_of(name, info.shape) for name, info in base.tensors.items()}
    sizes = {name: math.prod(info.shape) for name, info in base.tensors.items()}
    acted = [name for name, info in base.tensors.items() if method.acts_on(roles[name], len(info.shape))]
    stored = stored_dtype(base)
    widest = torch.float32 if dtype == "auto" else dtype_of(dtype)
    warnings = header_notes(base, experts)
    for name, expert in experts.items():
        if stored_dtype(expert) != stored:
            warnings.append(
                f"expert {name} is stored in {word_of(stored_dtype(expert))}, the base in {word_of(stored)}"
            )
    rows = {name: method.rows(name, roles[name], info.shape) for name, info in base.tensors.items()}
    held = [
        size if (some := rows[name]) is None else min(size, some * math.prod(base.tensors[name].shape[1:]))
        for name, size in sizes.items()
    ]
    return {
        "tensors": dict(Counter(role.module for role in roles.values())),
        "by_method": len(acted),
        "by_linear_rule": len(roles) - len(acted),
        "parameters": sum(sizes.values()),
        "bytes": sum(sizes.values()) * widest.itemsize,
        "dtype": dtype,
        "scale": method.scale,
        "passes": method.passes,
        "precision": word_of(method.precision),
        "rotations": _rotations(base, method, roles),
        "given": {name: _words(open_rotations(path)) for name, path in method.rotation_files.items()},
        "peak_bytes": max(held) * method.precision.itemsize * (2 * len(experts) + 4),
        "warnings": warnings,
    }


def _rotations(base: Checkpoint, method: Method, roles: Mapping[str, Role]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, role in roles.items():
        shape = base.tensors[name].shape
        side = method.side(name, role) if method.acts_on(role, len(shape)) else None
        if side is not None and role.module not in (modules := found.setdefault(how(shape, side), [])):
            modules.append(role.module)
    return {told: sorted(modules, key=[*MATRICES, *modules].index) for told, modules in found.items()}


def _words(file: RotationsFile) -> str:
    by = ", ".join(file.metadata[key] for key in ("parametrization", "objective") if key in file.metadata)
    return f"{len(file.sides)} rotations of {file.path}" + (f" ({by})" if by else "")


def stored_dtype(model: Checkpoint) -> torch.dtype:
    """The dtype of most of a checkpoint's values."""
    sizes = Counter[torch.dtype]()
    for info in model.tensors.values():
        sizes[info.dtype] += math.prod(info.shape)
    return sizes.most_common(1)[0][0]


def dtype_of(word: str) -> torch.dtype:
    if word not in DTYPES:
        raise ConfigError(f"dtype is {word!r}, one of auto, {', '.join(DTYPES)} is expected")
    return DTYPES[word]
