"""Every geometric measure of one matrix and its updates: rows of geometry.csv.

The real update, its controls and the planted rotations share one singular basis of the base.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from rotrl.evidence.nulls import CONTROLS, plant, seeded
from rotrl.linalg.spectrum import (
    Basis,
    Coordinates,
    Side,
    basis,
    coordinates,
    gram_drift,
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
    """What is drawn and compared: controls by name, planted fractions, share of singular vectors for the angles."""

    seed: int
    controls: Sequence[str]
    planted: Sequence[float]
    principal: float


def measure(W0: Tensor, tuned: Mapping[str, Tensor], tensor: str, settings: Settings) -> Iterator[Row]:
    """Rows of one matrix (m, n): for each tuned model and side the update, its controls and planted rotations."""
    frame = basis(W0)
    for expert, W1 in tuned.items():
        D = W1.double() - W0.double()
        about = {"expert": expert, "tensor": tensor, "rows": W0.shape[0], "cols": W0.shape[1]}
        if not D.any():
            yield from (
                {**about, "rel_norm": 0.0, "side": side, "unchanged_bf16": 1.0, "control": ""} for side in SIDES
            )
            continue
        for row in _update(W0, W1, D, frame, settings):
            yield {**about, **row, "control": ""}
        for control in settings.controls:
            drawn = CONTROLS[control](W0, D, frame, seeded(settings.seed, expert, tensor, control))
            for row in _update(W0, W0.double() + drawn, drawn, frame, settings):
                yield {**about, **row, "control": control}
        c = coordinates(frame, D)
        for side in SIDES:
            for fraction in settings.planted:
                control = f"planted_{fraction:g}"
                drawn = plant(c, fraction, side=side, generator=seeded(settings.seed, expert, tensor, side, control))
                yield {**about, **_rotation(drawn, side), "control": control}


def _update(W0: Tensor, W1: Tensor, D: Tensor, frame: Basis, settings: Settings) -> Iterator[Row]:
    c, after = coordinates(frame, D), basis(W1)
    k = max(1, round(settings.principal * frame.s.shape[-1]))
    both_sides = {
        "rel_norm": float(torch.linalg.matrix_norm(D) / torch.linalg.matrix_norm(W0.double())),
        "nu": float(nu(frame.s, after.s, D)),
        "rho": float(rho(W0, D)),
        "nss": float(nss(frame.s, after.s)),
        "unchanged_bf16": float(unchanged_bf16(W0, W1)),
    }
    for side in SIDES:
        before, turned = (frame.U, after.U) if side == "left" else (frame.V, after.V)
        yield {
            **both_sides,
            **_rotation(c, side),
            "gram": float(gram_drift(W0, D, c, side=side)),
            "angle_max": float(principal_angles(before[:, :k], turned[:, :k]).max()),
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
