"""Who descends from whom, told by the weights alone; checked before anything else is believed.

Siblings (both trained from the base) move independently: cos(A - base, B - base) is near 0 and ||A - B||^2 =
||A - base||^2 + ||B - base||^2. A child of A carries the whole of A's update, so <A - base, B - base> = ||A - base||^2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.evidence.consequences import consequences
from rotrl.evidence.kinship import SAME, Kinship, Sums, origin, overall, relate
from rotrl.evidence.table import write_table

COLUMNS = [
    "tensor",
    "norm_a",
    "norm_b",
    "norm_ab",
    "cosine",
    "dtype",
    "a",
    "b",
    "layer",
    "module",
    "norm_base",
    "carried_a",
    "carried_b",
    "unchanged_a",
    "unchanged_b",
    "inherited",
]
ROUNDINGS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK = 1 << 18  # entries in float64 at a time: what caches hold; 2^22 took four times as long


def lineage(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    out: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compares all pairs of experts of one base; writes out/lineage.csv, gives the verdict and what follows from it.

    Norms are of A - base, B - base and A - B; carried_a is the part of A's update that B holds, <A - base, B - base> /
    ||A - base||^2; unchanged the share of entries equal to the base as stored; inherited the share of the entries
    changed by A that are equal in B. The last row of each pair is "all". One expert alone is compared with the base.
    Raises CheckpointError if the models don't fit.
    """
    check_family(base, experts)
    found, rows = _compare(base, experts, list(base.tensors), progress)
    write_table(out / "lineage.csv", COLUMNS, rows)
    return found


def glance(base: Checkpoint, experts: Mapping[str, Checkpoint], *, entries: int = 1 << 25) -> dict[str, Any]:
    """The verdict of `lineage` from some of the matrices, spread over the layers: what a plan can tell in a second.

    `looked` and `tensors` say how many of how many tensors were read.
    """
    names = [name for name, info in base.tensors.items() if role_of(name, info.shape).is_matrix] or list(base.tensors)
    size = sum(math.prod(base.tensors[name].shape) for name in names) * len({"base", *experts})
    chosen = names[:: max(1, math.ceil(size / entries))]
    found, _ = _compare(base, experts, chosen, None)
    return found | {"looked": len(chosen), "tensors": len(base.tensors)}


def _compare(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    names: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The verdict over the named tensors, and the rows of lineage.csv."""
    models = {"base": base, **experts}
    pairs = list(combinations(experts, 2)) or [(name, name) for name in experts]
    copies = {pair: {SAME, *ROUNDINGS} for pair in permutations(models, 2)}
    kin = {pair: Kinship() for pair in pairs}
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for done, name in enumerate(names):
        tensors = {key: model.read(name) for key, model in models.items()}
        role = role_of(name, base.tensors[name].shape)
        for (original, copy), kinds in copies.items():
            kinds &= {kind for kind in kinds if _is_copy(tensors[original], tensors[copy], kind)}
        for pair in pairs:
            a, b = (tensors[expert] for expert in pair)
            sums = _sums(tensors["base"], a, b)
            kin[pair].add(sums, matrix=role.is_matrix)
            about = {"tensor": name, "layer": role.layer, "module": role.module}
            rows[pair].append(about | {"dtype": _dtypes(tensors["base"], a, b)} | _row(pair, sums))
        if progress:
            progress(done + 1, len(names))
    for pair in pairs:
        rows[pair].append({"tensor": "all"} | _row(pair, kin[pair].total))
    seen = {pair[0]: kin[pair] for pair in pairs} | {pair[1]: kin[pair].swapped for pair in pairs}
    origins = {name: origin(name, seen[name], copies) for name in experts}
    related = [relate(a, b, kin[a, b], origins, copies) for a, b in pairs if a != b]
    verdict, words = overall(related, origins)
    found = {
        "verdict": verdict,
        "words": words,
        "pairs": related,
        "experts": origins,
        "consequences": consequences(verdict, related),
    }
    return found, [row for pair in pairs for row in rows[pair]]


def _sums(base: Tensor, a: Tensor, b: Tensor) -> Sums:
    total = Sums()
    for chunk in zip(*(tensor.flatten().split(CHUNK) for tensor in (base, a, b)), strict=True):
        W, A, B = (part.double() for part in chunk)
        same_a, same_b = W == A, W == B
        counts = (same_a.sum(), same_b.sum(), ((A == B) & ~same_a).sum())
        da, db = A - W, B - W
        dots = (W @ W, da @ da, db @ db, da @ db, (A - B).square().sum(), W @ da, W @ db)
        total += Sums(W.numel(), *(float(value) for value in (*dots, *counts)))
    return total


def _is_copy(original: Tensor, copy: Tensor, kind: str) -> bool:
    """Whether `copy` holds the values of `original`, as they are or rounded through a dtype."""
    for part in (slice(0, 4096), slice(None)):  # most pairs differ at once
        x, y = original.flatten()[part], copy.flatten()[part]
        x = x if kind == SAME else x.to(ROUNDINGS[kind])
        wide = torch.promote_types(x.dtype, y.dtype)
        if not torch.equal(x.to(wide), y.to(wide)):
            return False
    return True


def _row(pair: tuple[str, str], sums: Sums) -> dict[str, Any]:
    a, b = pair
    row = {
        "a": a,
        "norm_base": math.sqrt(sums.base2),
        "norm_a": math.sqrt(sums.a2),
        "unchanged_a": sums.equal_a / sums.entries,
    }
    if a == b:
        return row
    return row | {
        "b": b,
        "norm_b": math.sqrt(sums.b2),
        "norm_ab": math.sqrt(sums.difference2),
        "cosine": sums.cosine,
        "carried_a": sums.carried,
        "carried_b": sums.swapped.carried,
        "unchanged_b": sums.equal_b / sums.entries,
        "inherited": sums.inherited_share,
    }


def _dtypes(*tensors: Tensor) -> str:
    """The stored dtype, or those of base/A/B where they differ."""
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    return "/".join(names if len(set(names)) > 1 else names[:1])
