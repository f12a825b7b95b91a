"""What the rows of geometry.csv say together: medians with intervals over layers, calibrated, and verdicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rotrl.evidence.measure import SIDES, Row
from rotrl.evidence.nulls import planted_fraction
from rotrl.evidence.table import plain
from rotrl.evidence.verdict import Thresholds, expert_verdict, judge, overall_verdict


def summarise(
    rows: Sequence[Row], thresholds: Thresholds, *, bootstrap: int, seed: int, references: Sequence[str] = ()
) -> dict[str, Any]:
    """Medians, intervals and verdicts from the rows of geometry.csv; NaN becomes None."""
    moved = [row for row in rows if "kappa" in row]
    real = [dict(row) for row in moved if row["control"] == ""]
    curves: dict[tuple, list[tuple[float, float]]] = {}
    for row in moved:
        if row["control"].startswith("planted_"):
            key = (row["expert"], row["tensor"], row["side"])
            curves.setdefault(key, []).append((float(row["control"].removeprefix("planted_")), row["kappa"]))
    for row in real:
        curve = curves.get((row["expert"], row["tensor"], row["side"]))
        row["fraction"] = planted_fraction(row["kappa"], curve) if curve else float("nan")

    experts = list(dict.fromkeys(row["expert"] for row in rows))
    modules = list(dict.fromkeys(row["module"] for row in rows))
    groups = [
        _group(
            [row for row in real if row["expert"] == e and row["side"] == s and m in ("all", row["module"])], e, m, s
        )
        for e in experts
        for m in ("all", *modules)
        for s in SIDES
    ]
    for group in groups:
        layers = group.pop("kappas")
        low, high = bootstrap_median(layers, bootstrap, seed)
        median = group["kappa_median"]
        group |= {"kappa_low": low, "kappa_high": high, "verdict": judge(median, low, high, thresholds)}
    controls = [
        {"expert": e, "control": control, "side": s, **_medians(chosen)}
        for e in experts
        for control in dict.fromkeys(row["control"] for row in moved if row["control"])
        for s in SIDES
        if (chosen := [r for r in moved if (r["expert"], r["control"], r["side"]) == (e, control, s)])
    ]
    verdicts = {e: expert_verdict(e, [g for g in groups if g["expert"] == e], controls) for e in experts}
    return {
        "rows": [plain(group) for group in groups],
        "controls": [plain(control) for control in controls],
        "experts": verdicts,
        "references": list(references),
        "verdict": overall_verdict(verdicts, references),
        "thresholds": {**thresholds._asdict(), "words": thresholds.words},
        "unmoved": sorted({f"{row['expert']}: {row['tensor']}" for row in rows if "kappa" not in row}),
    }


def bootstrap_median(layers: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the median of (layers, matrices of a layer), layers resampled; NaN below two."""
    if len(layers) < 2:
        return float("nan"), float("nan")
    from scipy.stats import bootstrap

    def median(chosen: np.ndarray, axis: int) -> np.ndarray:
        return np.nanmedian(layers[chosen].reshape(*chosen.shape[:-1], -1), axis=axis)

    found = bootstrap(
        (np.arange(len(layers)),),
        median,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _group(rows: Sequence[Row], expert: str, module: str, side: str) -> dict[str, Any]:
    layers: dict[Any, list[float]] = {}
    for row in rows:
        if not np.isnan(row["kappa"]):
            layers.setdefault(row["layer"], []).append(row["kappa"])
    width = max(map(len, layers.values()), default=0)
    padded = np.array([kappas + [np.nan] * (width - len(kappas)) for kappas in layers.values()])
    return {"expert": expert, "module": module, "side": side, **_medians(rows), "kappas": padded}


def _medians(rows: Sequence[Row]) -> dict[str, float]:
    keys = ("kappa", "share", "null", "nu", "rho", "gram", "fraction")
    values = {key: [row[key] for row in rows if not np.isnan(row.get(key, np.nan))] for key in keys}
    return {f"{key}_median": float(np.median(found)) if found else float("nan") for key, found in values.items()}
