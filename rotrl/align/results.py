"""What an alignment leaves: rotations.safetensors, align.csv and the figures of the summary."""

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
from rotrl.checkpoint.rotations import Rotation, save_rotations
from rotrl.errors import NumericsError
from rotrl.linalg.rotation import angles, orthogonality_error

FILE = "rotations.safetensors"
ORTHOGONAL = 1e-5  # largest |R^T R - I| that is written
COLUMNS = ("tensor", "layer", "module", "side", "angle_rms", "angle_max", "explained")


def write_results(
    out: Path,
    problem: Problem,
    rotations: Mapping[str, Rotation],
    models: Mapping[str, Checkpoint],
    *,
    closed: Mapping[str, Rotation],
    parametrization: str,
    objective: str,
) -> dict[str, Any]:
    """Writes both files; returns source, teachers, objective, angles (degrees), orthogonality error and explained.

    `explained = 1 - |R S - T|^2 / |S - T|^2` with T the mean of the teachers: 1 reaches it, 0 is no rotation at all;
    `closed_form` is the same of the Procrustes rotations `closed`, the best there is. NumericsError where rotations are
    not orthogonal.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, squares, largest, error = [], [], 0.0, 0.0
    for name, rotation in rotations.items():
        side = "left" if rotation.left is not None else "right"
        matrix = getattr(rotation, side).double()
        found = angles(matrix).rad2deg()
        squares.append(found.square())
        largest, error = max(largest, float(found.max())), max(error, float(orthogonality_error(matrix)))
        role = role_of(name, problem.state[name].shape)
        share = explained(problem, {name: rotation})
        rms = float(found.square().mean().sqrt())
        rows.append((name, role.layer, role.module, side, rms, float(found.max()), share))
    if not error < ORTHOGONAL:
        raise NumericsError(f"rotations lost orthogonality (max |R^T R - I| is {error:.1e}); lower align.lr")
    with whole_file(out / "align.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    metadata = {
        "source": json.dumps(problem.spec),
        "teachers": json.dumps(list(problem.teachers)),
        "parametrization": parametrization,
        "objective": objective,
        "orthogonality_error": f"{error:.3e}",
        "inputs": json.dumps({name: model.sha256 for name, model in models.items()}),
    }
    save_rotations(out / FILE, rotations, metadata)
    return {
        "source": problem.spec,
        "teachers": list(problem.teachers),
        "parametrization": parametrization,
        "objective": objective,
        "angle_rms": float(torch.cat(squares).mean().sqrt()),
        "angle_max": largest,
        "orthogonality_error": error,
        "explained": explained(problem, rotations),
        "closed_form": explained(problem, closed),
        "rotations": FILE,
    }


def explained(problem: Problem, rotations: Mapping[str, Rotation]) -> float | None:
    """Share of `sum |S - T|^2` that the rotations remove; None where source and target are equal."""
    left = total = 0.0
    for name, rotation in rotations.items():
        source, target = problem.state[name].double(), problem.target(name)
        left += float(_energy(rotation.apply(source) - target))
        total += float(_energy(source - target))
    return 1 - left / total if total else None


def _energy(matrix: Tensor) -> Tensor:
    return matrix.square().sum()
