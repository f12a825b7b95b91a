"""Summaries that stand beside kappa: bands of the spectrum, the published suite over noise, pairs of updates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rotrl.evidence.verdict import NOISE

Row = Mapping[str, Any]
SUITE = ("two_sided", "nss", "angle_mean", "angle_max", "unchanged_bf16", "principal_overlap", "low_overlap")


def band_summary(rows: Sequence[Row], edges: Sequence[float]) -> list[dict[str, Any]]:
    """Medians over the matrices of every expert, side and band, the largest singular values first."""
    spans = list(zip((0.0, *edges), (*edges, 1.0), strict=True))
    found = []
    for expert in dict.fromkeys(row["expert"] for row in rows):
        for side in dict.fromkeys(row["side"] for row in rows):
            for start, stop in spans:
                about = {"expert": expert, "side": side, "start": start, "stop": stop}
                band = [row for row in rows if all(row[key] == value for key, value in about.items())]
                if band:
                    angles = [row["angle"] / row["angle_noise"] for row in band if row["angle_noise"]]
                    found.append(
                        about
                        | {key: _median([row[key] for row in band]) for key in ("kappa", "share", "null")}
                        | {"energy_ratio": _median([row["energy"] / row["energy_noise"] for row in band])}
                        | {"angle_ratio": _median(angles)}
                    )
    return found


def suite_summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of every expert and published measure: the median over matrices, that of noise of the same norm, their ratio.

    The ratio is the median of those of the matrices; without the isotropic control there is no noise to compare with.
    """
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["control"] in ("", NOISE):
            for measure in SUITE:
                sided = measure.startswith("angle")
                if row.get(measure) is not None and (sided or row["side"] == "left"):
                    name = f"{measure}_{row['side']}" if sided else measure
                    values.setdefault((row["expert"], name, row["control"]), {})[row["tensor"]] = row[measure]
    found = []
    for expert, measure, control in values:
        if not control:
            update, noise = values[expert, measure, ""], values.get((expert, measure, NOISE), {})
            ratios = [value / noise[tensor] for tensor, value in update.items() if noise.get(tensor)]
            about = {"expert": expert, "measure": measure, "update": _median(list(update.values()))}
            found.append(about | {"noise": _median(list(noise.values())), "ratio": _median(ratios)})
    return found


def pair_summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of every two models: the cosine of their whole updates with its spread, the rest as medians over matrices."""
    found = []
    for a, b in dict.fromkeys((row["a"], row["b"]) for row in rows):
        chosen = [row for row in rows if (row["a"], row["b"]) == (a, b)]
        norms, cosines, spreads = (
            np.array([[row[key] for key in keys] for row in chosen]).T
            for keys in (("norm_a", "norm_b"), ("cosine",), ("cosine_spread",))
        )
        inner, size = norms.prod(0), np.linalg.norm(norms, axis=1).prod()
        medians = ("generators", "commutator", "commutator_null", "jaccard", "jaccard_random", "jaccard_noise")
        found.append(
            {"a": a, "b": b, "cosine": float((cosines * inner).sum() / size)}
            | {"cosine_spread": float(np.linalg.norm(spreads * inner) / size)}
            | {key: _median([row[key] for row in chosen if row.get(key) is not None]) for key in medians}
        )
    return found


def _median(values: Sequence[float]) -> float:
    kept = [value for value in values if not np.isnan(value)]
    return float(np.median(kept)) if kept else float("nan")
