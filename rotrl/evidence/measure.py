"""Every geometric measure of one matrix and its updates: rows of geometry.csv.

The real update, its controls and the planted rotations share one singular basis of the base.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from rotrl.evidence.nulls import CONTROLS, plant, seeded
from rotrl.linalg.spectrum import (
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
    unchanged_bf16,
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
    "unchanged_bf16",
    "control",
]
SIDES: tuple[Side, ...] = get_args(Side)
Row = dict[str, Any]


class Settings(NamedTuple):
    """What is drawn and compared: controls by name, planted fractions, share of singular vectors for the angles; and
    the dtype ("float64" or "float32") of the basis and the updates."""

    seed: int
    controls: Sequence[str]
    planted: Sequence[float]
    principal: float
    dtype: str = "float64"


def measure(W0: Tensor, tuned: Mapping[str, Tensor], tensor: str, settings: Settings) -> Iterator[Row]:
    """Rows of one matrix (m, n): for each tuned model and side the update, its controls and planted rotations.

    The one SVD is that of the base. All else happens in its basis, on squares of the smaller side.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    frame = basis(W0, dtype)
    for expert, W1 in tuned.items():
        D = W1.to(dtype) - W0.to(dtype)
        about = {"expert": expert, "tensor": tensor, "rows": W0.shape[0], "cols": W0.shape[1]}
        if not D.any():
            yield from (
                {**about, "rel_norm": 0.0, "side": side, "unchanged_bf16": 1.0, "control": ""} for side in SIDES
            )
            continue
        c = coordinates(frame, D)
        unchanged = {"unchanged_bf16": float(unchanged_bf16(W0, W1))}
        yield from ({**about, **row, **unchanged, "control": ""} for row in _update(c, settings))
        for control in settings.controls:
            drawn = CONTROLS[control](W0, D, c, seeded(settings.seed, expert, tensor, control))
            unchanged = {}
            if isinstance(drawn, Tensor):
                unchanged = {"unchanged_bf16": float(unchanged_bf16(W0, W0.to(dtype) + drawn))}
                drawn = coordinates(frame, drawn)
            yield from ({**about, **row, **unchanged, "control": control} for row in _update(drawn, settings))
        for side in SIDES:
            for fraction in settings.planted:
                control = f"planted_{fraction:g}"
                drawn = plant(c, fraction, side=side, generator=seeded(settings.seed, expert, tensor, side, control))
                yield {**about, **_rotation(drawn, side), "control": control}


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
        before = torch.eye(len(turned), k, dtype=turned.dtype)
        yield {
            **both_sides,
            **_rotation(c, side),
            "gram": float(gram_drift(c, side=side)),
            "angle_max": float(principal_angles(before, turned).max()),
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
