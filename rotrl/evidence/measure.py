"""Every geometric measure of matrices and their updates: rows of geometry.csv, bands.csv and pairs.csv.

The real update, its controls and the planted rotations share one singular basis of the base. Matrices of one shape are
measured together, (b, m, n); what is drawn depends on the tensor's name, so each has the same rows in any batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from rotrl.evidence.bands import band_rows
from rotrl.evidence.masks import Masks, changed, density, masks, overlap
from rotrl.evidence.nulls import CONTROLS, plant, seeded
from rotrl.evidence.pairs import Update, pair_row
from rotrl.evidence.verdict import NOISE
from rotrl.linalg.spectrum import (
    Basis,
    Coordinates,
    Side,
    along_base,
    basis,
    coordinates,
    gram_drift,
    leading_angles,
    moved,
    nss,
    nu,
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
    "along_base",
    "two_sided",
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


class Batch(NamedTuple):
    """Bases W0 (b, m, n) by the names of the tensors, their singular bases, and where they are principal or small."""

    tensors: Sequence[str]
    W0: Tensor
    frame: Basis
    masks: Masks
    settings: Settings

    def generators(self, expert: str, *what: str) -> list[Generator]:
        """One for each matrix, named by what it draws."""
        device = str(self.W0.device)
        return [seeded(self.settings.seed, expert, tensor, *what, device=device) for tensor in self.tensors]


class Tables:
    """{tensor: {"geometry", "bands", "pairs": rows}} of a batch."""

    def __init__(self, tensors: Sequence[str]) -> None:
        self.rows: dict[str, dict[str, list[Row]]] = {
            tensor: {"geometry": [], "bands": [], "pairs": []} for tensor in tensors
        }

    def add(self, table: str, columns: Iterable[Row], about: Row, where: Sequence[bool]) -> None:
        """Rows of the tensors that are marked, each from columns: tensors of b numbers, or one value for all."""
        for row in columns:
            lists = {key: value.tolist() for key, value in row.items() if isinstance(value, Tensor)}
            for i, (tensor, tables) in enumerate(self.rows.items()):
                if where[i]:
                    tables[table].append({**about, "tensor": tensor, **row, **{key: v[i] for key, v in lists.items()}})


def measure(
    W0: Tensor, tuned: Mapping[str, Tensor], tensors: Sequence[str], settings: Settings, device: str = "cpu"
) -> dict[str, dict[str, list[Row]]]:
    """{tensor: {"geometry", "bands", "pairs": rows}} of b matrices W0 (b, m, n) and their tuned versions.

    Geometry holds for each of these and each side the update, its controls and planted rotations. The one SVD is that
    of the base. All else happens in its basis, on squares of the smaller side.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    W0 = W0.to(device)
    frame = basis(W0, dtype)
    batch = Batch(tensors, W0, frame, masks(W0, frame, settings.principal), settings)
    found, updates, moves = Tables(tensors), {}, {}
    for expert, W1 in tuned.items():
        W1 = W1.to(device)
        D = W1.to(dtype) - W0.to(dtype)
        moves[expert] = D.flatten(1).any(-1).tolist()
        about = {"expert": expert, "rows": W0.shape[-2], "cols": W0.shape[-1]}
        still = {"rel_norm": 0.0, "unchanged_bf16": 1.0, "control": ""}
        unmoved = [not moving for moving in moves[expert]]
        found.add("geometry", [{**still, "side": side} for side in SIDES], about, unmoved)
        if any(moves[expert]):
            update = Update(D, coordinates(frame, D), changed(W0, W1))
            rows, noise = _with_controls(batch, expert, update)
            found.add("geometry", rows, about, moves[expert])
            bands = (row for side in SIDES for row in band_rows(update.c, side=side, edges=settings.bands))
            found.add("bands", bands, {"expert": expert}, moves[expert])
            updates[expert] = update._replace(noise=noise)
    for a, b in combinations(updates, 2):
        both = [x and y for x, y in zip(moves[a], moves[b], strict=True)]
        found.add("pairs", [pair_row(updates[a], updates[b])], {"a": a, "b": b}, both)
    return found.rows


def _with_controls(batch: Batch, expert: str, update: Update) -> tuple[list[Row], Tensor | None]:
    """The update, its controls and the planted rotations, a row a side; and the entries that the noise changes."""
    W0, D, c, settings = batch.W0, update.D, update.c, batch.settings
    rows, noise = [{**row, **_changes(batch, update.mask), "control": ""} for row in _update(c, settings)], None
    for control in settings.controls:
        drawn, changes = CONTROLS[control](W0, D, c, batch.generators(expert, control)), {}
        if isinstance(drawn, Tensor):
            mask = changed(W0, W0.to(D.dtype) + drawn)
            noise = mask if control == NOISE else noise
            drawn, changes = coordinates(batch.frame, drawn), _changes(batch, mask)
        rows += [{**row, **changes, "control": control} for row in _update(drawn, settings)]
    for side in SIDES:
        for fraction in settings.planted:
            control = f"planted_{fraction:g}"
            drawn = plant(c, fraction, side=side, generators=batch.generators(expert, side, control))
            rows.append({**_rotation(drawn, side), "control": control})
    return rows, noise


def _changes(batch: Batch, mask: Tensor) -> Row:
    """Share of the entries that keep their bits in bf16, and where the others lie."""
    return {
        "unchanged_bf16": 1.0 - density(mask),
        "principal_overlap": overlap(batch.masks.principal, mask),
        "low_overlap": overlap(batch.masks.low, mask),
    }


def _update(c: Coordinates, settings: Settings) -> Iterator[Row]:
    after = moved(c, max(1, round(settings.principal * c.s.shape[-1])))
    both_sides = {
        "rel_norm": c.energy.sqrt() / torch.linalg.vector_norm(c.s, dim=-1),
        "nu": nu(after.s, c),
        "rho": rho(c),
        "along_base": along_base(c),
        "two_sided": tangency(c, side="both").share,
        "nss": nss(c.s, after.s),
    }
    for side, turned in zip(SIDES, (after.left, after.right), strict=True):
        angles = leading_angles(turned)
        yield {
            **both_sides,
            **_rotation(c, side),
            "gram": gram_drift(c, side=side),
            "angle_max": angles.amax(-1),
            "angle_mean": angles.mean(-1),
        }


def _rotation(c: Coordinates, side: Side) -> Row:
    """Share, null and kappa with the interval +- 1.96 standard deviations of kappa over the sign flips of T."""
    found = tangency(c, side=side)
    kappa, spread = found.kappa, 1.96 * found.kappa_spread
    return {
        "side": side,
        "share": found.share,
        "null": found.null,
        "kappa": kappa,
        "kappa_low": kappa - spread,
        "kappa_high": kappa + spread,
    }
