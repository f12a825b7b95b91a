"""What an alignment leaves: its rotations or deltas, align.csv and the figures of the summary."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotrl.align.source import Problem
from rotrl.checkpoint.files import whole_file
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.rotations import SIDES, Delta, Rotation, save_rotations
from rotrl.errors import NumericsError
from rotrl.linalg.rotation import angles, orthogonality_error

ROTATIONS, DELTAS = "rotations.safetensors", "deltas.safetensors"
ORTHOGONAL = 1e-5  # largest |R^T R - I| that is written
COLUMNS = ("tensor", "layer", "module", "side", "angle_rms", "angle_max", "explained", "change")

Learned = Mapping[str, Rotation | Delta]


def write_results(
    out: Path,
    problem: Problem,
    learned: Learned,
    models: Mapping[str, Checkpoint],
    parametrization: str,
    objective: str,
    *,
    closed: Mapping[str, Rotation] | None,
    details: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Writes both files; returns source, teachers, objective, angles (degrees), orthogonality error and explained.

    Rotations go to rotations.safetensors, what is none to deltas.safetensors. `explained = 1 - |W - T|^2 / |S - T|^2`
    with W the adapted weights and T the mean of the teachers: 1 reaches it, 0 is no change at all; `closed_form` is
    the same of the Procrustes rotations `closed`, the best that rotations can. `change = |W - S| / |S|`. Angles and
    orthogonality error are None where nothing is rotated. NumericsError where rotations are not orthogonal.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, found, error = [], {}, 0.0
    for name, adapted in learned.items():
        role = role_of(name, problem.state[name].shape)
        figures = (explained(problem, {name: adapted}), change(problem, {name: adapted}))
        extra = (details or {}).get(name, {}).values()
        for side in _sides(adapted) or ("",):
            spread: tuple[float | None, ...] = (None, None)
            if side:
                matrix = getattr(adapted, side).double()
                found[name, side] = angles(matrix).rad2deg()
                error = max(error, float(orthogonality_error(matrix)))
                spread = (_rms(found[name, side]), float(found[name, side].max()))
            rows.append((name, role.layer, role.module, side, *spread, *figures, *extra))
    if not error < ORTHOGONAL:
        raise NumericsError(f"rotations lost orthogonality (max |R^T R - I| is {error:.1e}); lower align.lr")
    columns = COLUMNS + tuple(next(iter((details or {}).values()), {}))
    with whole_file(out / "align.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    metadata = {
        "source": json.dumps(problem.spec),
        "teachers": json.dumps(list(problem.teachers)),
        "parametrization": parametrization,
        "objective": objective,
        **({"orthogonality_error": f"{error:.3e}"} if found else {}),
        "inputs": json.dumps({name: model.sha256 for name, model in models.items()}),
    }
    save_rotations(out / (ROTATIONS if found else DELTAS), learned, metadata)
    return {
        "source": problem.spec,
        "teachers": list(problem.teachers),
        "parametrization": parametrization,
        "objective": objective,
        "angle_rms": _rms(torch.cat(list(found.values()))) if found else None,
        "angle_max": max(float(angle.max()) for angle in found.values()) if found else None,
        "orthogonality_error": error if found else None,
        "explained": explained(problem, learned),
        "closed_form": explained(problem, closed) if closed else None,
        "change": change(problem, learned),
        "rotations": ROTATIONS if found else DELTAS,
    }


def learned_file(folder: Path) -> Path | None:
    """The file of rotations or deltas that an alignment left in `folder`."""
    return next((path for name in (ROTATIONS, DELTAS) if (path := folder / name).is_file()), None)


def explained(problem: Problem, learned: Learned) -> float | None:
    """Share of `sum |S - T|^2` that is removed; None where source and target are equal."""
    left = total = 0.0
    for name, adapted in learned.items():
        source, target = problem.state[name].double(), problem.target(name)
        left += float(_energy(adapted.apply(source) - target))
        total += float(_energy(source - target))
    return 1 - left / total if total else None


def change(problem: Problem, learned: Learned) -> float:
    """Length of the change over that of the source, of all tensors together."""
    moved = whole = 0.0
    for name, adapted in learned.items():
        source = problem.state[name].double()
        moved += float(_energy(adapted.apply(source) - source))
        whole += float(_energy(source))
    return (moved / whole) ** 0.5


def _sides(adapted: Rotation | Delta) -> tuple[str, ...]:
    return tuple(side for side in SIDES if getattr(adapted, side, None) is not None)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _energy(matrix: Tensor) -> Tensor:
    return matrix.square().sum()
