"""Every geometric measure of one matrix and its updates: rows of geometry.csv, bands.csv and pairs.csv.

The real update, its controls and the planted rotations share one singular basis of the base.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from rotrl.evidence.bands import band_rows
from rotrl.evidence.masks import Masks, changed, masks, overlap
from rotrl.evidence.nulls import CONTROLS, isotropic, plant, seeded
from rotrl.evidence.pairs import Update, pair_row
from rotrl.linalg.spectrum import (
    Basis,
    Coordinates,
    Side,
    basis,
    coordinates,
    gram_drift,
    moved,
    nss,
    nu,
    principal_angles,
    rho,
)
from rotrl.linalg.tangent import tangency

COLUMNS = [
    "expert",
    "tensor",
    "layer",
    "module",
    "rows",
    "cols",
    "rel_norm",
    "side",
    "share",
    "null",
    "kappa",
    "kappa_low",
    "kappa_high",
    "nu",
    "rho",
    "gram",
    "nss",
    "angle_max",
    "angle_mean",
    "unchanged_bf16",
    "principal_overlap",
    "low_overlap",
    "control",
]
SIDES: tuple[Side, ...] = get_args(Side)
Row = dict[str, Any]


class Settings(NamedTuple):
    """What is drawn and compared: controls by name, planted fractions, share of singular vectors (and of entries) that
    are principal, edges of the bands of the spectrum; and the dtype ("float64" or "float32") of basis and updates."""

    seed: int
    controls: Sequence[str]
    planted: Sequence[float]
    principal: float
    dtype: str = "float64"
    bands: Sequence[float] = (0.1, 0.9)


def measure(
    W0: Tensor, tuned: Mapping[str, Tensor], tensor: str, settings: Settings, device: str = "cpu"
) -> dict[str, list[Row]]:
    """{"geometry", "bands", "pairs": rows} of one matrix (m, n) and its tuned versions.

    Geometry holds for each of them and each side the update, its controls and planted rotations. The one SVD is that of
    the base. All else happens in its basis, on squares of the smaller side.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    W0 = W0.to(device)
    frame = basis(W0, dtype)
    principal = masks(W0, frame, settings.principal)
    rows: dict[str, list[Row]] = {"geometry": [], "bands": [], "pairs": []}
    updates: dict[str, Update] = {}
    for expert, W1 in tuned.items():
        W1 = W1.to(device)
        D = W1.to(dtype) - W0.to(dtype)
        about = {"expert": expert, "tensor": tensor}
        if not D.any():
            shape = {"rows": W0.shape[0], "cols": W0.shape[1]}
            rows["geometry"] += [
                {**about, **shape, "rel_norm": 0.0, "side": side, "unchanged_bf16": 1.0, "control": ""}
                for side in SIDES
            ]
            continue
        c = coordinates(frame, D)
        updates[expert] = Update(D, c, changed(W0, W1), _noise(W0, D, c, expert, tensor, settings, len(tuned)))
        found = _with_controls(W0, updates[expert], frame, principal, (expert, tensor), settings)
        rows["geometry"] += [about | {"rows": W0.shape[0], "cols": W0.shape[1]} | row for row in found]
        rows["bands"] += [about | row for side in SIDES for row in band_rows(c, side=side, edges=settings.bands)]
    for a, b in combinations(updates, 2):
        rows["pairs"].append({"a": a, "b": b, "tensor": tensor, **pair_row(updates[a], updates[b])})
    return rows


def _noise(
    W0: Tensor, D: Tensor, c: Coordinates, expert: str, tensor: str, settings: Settings, models: int
) -> Tensor | None:
    """The entries that the isotropic control changes, where it is drawn and there is a pair to compare it in."""
    if models < 2 or "isotropic" not in settings.controls:
        return None
    return changed(W0, W0.to(D.dtype) + isotropic(W0, D, c, seeded(settings.seed, expert, tensor, "isotropic")))


def _with_controls(
    W0: Tensor, update: Update, frame: Basis, principal: Masks, names: tuple[str, str], settings: Settings
) -> Iterator[Row]:
    """The update, its controls and the planted rotations, a row a side."""
    D, c = update.D, update.c
    yield from ({**row, **_changes(principal, update.mask), "control": ""} for row in _update(c, settings))
    for control in settings.controls:
        drawn = CONTROLS[control](W0, D, c, seeded(settings.seed, *names, control))
        changes = {}
        if isinstance(drawn, Tensor):
            changes = _changes(principal, changed(W0, W0.to(D.dtype) + drawn))
            drawn = coordinates(frame, drawn)
        yield from ({**row, **changes, "control": control} for row in _update(drawn, settings))
    for side in SIDES:
        for fraction in settings.planted:
            control = f"planted_{fraction:g}"
            drawn = plant(c, fraction, side=side, generator=seeded(settings.seed, *names, side, control))
            yield {**_rotation(drawn, side), "control": control}


def _changes(principal: Masks, mask: Tensor) -> Row:
    """Share of the entries that keep their bits in bf16, and where the others lie."""
    return {
        "unchanged_bf16": 1.0 - float(mask.double().mean()),
        "principal_overlap": overlap(principal.principal, mask),
        "low_overlap": overlap(principal.low, mask),
    }


def _update(c: Coordinates, settings: Settings) -> Iterator[Row]:
    k = max(1, round(settings.principal * c.s.shape[-1]))
    after = moved(c, k)
    both_sides = {
        "rel_norm": float(c.energy.sqrt() / torch.linalg.vector_norm(c.s)),
        "nu": float(nu(after.s, c)),
        "rho": float(rho(c)),
        "nss": float(nss(c.s, after.s)),
    }
    for side, turned in zip(SIDES, (after.left, after.right), strict=True):
        angles = principal_angles(torch.eye(len(turned), k, dtype=turned.dtype, device=turned.device), turned)
        yield {
            **both_sides,
            **_rotation(c, side),
            "gram": float(gram_drift(c, side=side)),
            "angle_max": float(angles.max()),
            "angle_mean": float(angles.mean()),
        }


def _rotation(c: Coordinates, side: Side) -> Row:
    """Share, null and kappa with the interval +- 1.96 standard deviations of kappa over the sign flips of T."""
    found = tangency(c, side=side)
    kappa, spread = float(found.kappa), float(found.kappa_spread)
    return {
        "side": side,
        "share": float(found.share),
        "null": float(found.null),
        "kappa": kappa,
        "kappa_low": kappa - 1.96 * spread,
        "kappa_high": kappa + 1.96 * spread,
    }
