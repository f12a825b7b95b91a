"""What an alignment leaves: its rotations or deltas, align.csv and the figures of the summary."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotrl.align.source import Problem
from rotrl.checkpoint.files import whole_file
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.rotations import SIDES, Delta, Rotation, is_frame, save_rotations
from rotrl.errors import NumericsError
from rotrl.linalg.frames import frame_angles
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
    rows, found, error, whole, solved = [], {}, 0.0, Energies(), Energies()
    for name, adapted in learned.items():
        source = problem.state[name].double()
        role, target = role_of(name, source.shape), problem.target(name)
        whole += (energies := energies_of(source, adapted, target))
        solved += energies_of(source, closed[name], target) if closed else Energies()
        extra = (details or {}).get(name, {}).values()
        for side in _sides(adapted) or ("",):
            spread: tuple[float | None, ...] = (None, None)
            if side:
                found[name, side] = _angles(source, adapted, side).rad2deg()
                error = max(error, float(orthogonality_error(_columns(getattr(adapted, side)))))
                spread = (_rms(found[name, side]), float(found[name, side].max()))
            rows.append((name, role.layer, role.module, side, *spread, energies.explained, energies.change, *extra))
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
        "explained": whole.explained,
        "closed_form": solved.explained if closed else None,
        "change": whole.change,
        "rotations": ROTATIONS if found else DELTAS,
    }


def learned_file(folder: Path) -> Path | None:
    """The file of rotations or deltas that an alignment left in `folder`."""
    return next((path for name in (ROTATIONS, DELTAS) if (path := folder / name).is_file()), None)


class Energies(NamedTuple):
    """Squared distances: left of source to target, of both, that the source was moved, and from its zero."""

    left: float = 0.0
    total: float = 0.0
    moved: float = 0.0
    source: float = 0.0

    def __add__(self, other: "Energies") -> "Energies":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Energies(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def explained(self) -> float | None:
        """Share of `|S - T|^2` that is removed; None where source and target are equal."""
        return 1 - self.left / self.total if self.total else None

    @property
    def change(self) -> float:
        """Length of the change over that of the source."""
        return (self.moved / self.source) ** 0.5


def energies_of(source: Tensor, adapted: Rotation | Delta, target: Tensor) -> Energies:
    """Of one tensor."""
    moved = adapted.apply(source)
    parts = (moved - target, source - target, moved - source, source)
    return Energies(*(float(part.square().sum()) for part in parts))


def _angles(source: Tensor, adapted: Rotation | Delta, side: str) -> Tensor:
    matrix = getattr(adapted, side).double()
    if not is_frame(matrix):
        return angles(matrix)
    return frame_angles(source if side == "left" else source.mT, _columns(matrix))


def _columns(side: Tensor) -> Tensor:
    """What has orthonormal columns: a whole rotation, or a frame or its transpose."""
    matrix = side.double()
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def _sides(adapted: Rotation | Delta) -> tuple[str, ...]:
    return tuple(side for side in SIDES if getattr(adapted, side, None) is not None)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
