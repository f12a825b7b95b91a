"""Is the update a rotation? Every measure on every matrix, beside its controls, and a verdict by stated thresholds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.errors import CheckpointError, ConfigError
from rotrl.evidence.bands import COLUMNS as BANDS
from rotrl.evidence.beside import band_summary, pair_summary, suite_summary
from rotrl.evidence.measure import COLUMNS, SIDES, Row, Settings, measure
from rotrl.evidence.nulls import CONTROLS, check_controls, planted_fraction
from rotrl.evidence.pairs import COLUMNS as PAIRS
from rotrl.evidence.table import Work, defined, write_table
from rotrl.evidence.verdict import Thresholds, expert_verdict, judge, overall_verdict

TABLES = {"geometry": COLUMNS, "bands": BANDS, "pairs": PAIRS}


def geometry(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    out: Path,
    *,
    seed: int = 0,
    controls: Sequence[str] = tuple(CONTROLS),
    planted: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 1.0),
    principal: float = 0.1,
    bootstrap: int = 1000,
    rotation: float = 0.5,
    none: float = 0.05,
    bands: Sequence[float] = (0.1, 0.9),
    dtype: str = "float64",
    device: str = "auto",
    references: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures base -> each expert on all attention and MLP matrices; gives the summary and writes, below out,
    geometry.csv, bands.csv (by parts of the spectrum: bands.band_rows) and pairs.csv (two experts: pairs.pair_row).

    In geometry.csv one row a matrix, expert and side; `control` is "" for the real update, a control's name, or
    planted_<fraction>. kappa_low and kappa_high are kappa -+ 1.96 standard deviations over the sign-flip null. The
    summary holds medians with bootstrap intervals over layers, the planted fraction that would show the same kappa, and
    verdicts. Experts named in `references` (an SFT of the same base, say) are those that the others must differ from to
    be special. Rows are kept by matrix in out/geometry.work.jsonl until all are there: a call that was killed goes on
    from it. Raises ConfigError on unknown names or settings out of range, CheckpointError if the models don't fit.
    """
    check_controls(controls)
    _check(experts, planted, principal, bands, references, dtype)
    where = torch_device(device)
    check_family(base, experts)
    roles = {name: role_of(name, info.shape) for name, info in base.tensors.items()}
    names = [name for name, role in roles.items() if role.is_matrix]
    if not names:
        raise CheckpointError(f"{base.path}: no tensor is named like a matrix of attention or MLP (..._proj.weight)")
    settings = Settings(seed, list(controls), list(planted), principal, dtype, list(bands))
    inputs = {name: model.sha256 for name, model in {"": base, **experts}.items()}
    work = Work(out / "geometry.work.jsonl", [settings._asdict(), inputs])
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    for done, name in enumerate(names):
        if name not in work.rows:
            tuned = {expert: model.read(name) for expert, model in experts.items()}
            about = {"layer": roles[name].layer, "module": roles[name].module}
            measured = measure(base.read(name), tuned, name, settings, where)
            work.add(name, [about | row | {"table": table} for table, rows in measured.items() for row in rows])
        for row in work.rows[name]:
            tables[row["table"]].append({key: value for key, value in row.items() if key != "table"})
        if progress:
            progress(done + 1, len(names))
    for table, columns in TABLES.items():
        if tables[table]:
            write_table(out / f"{table}.csv", columns, tables[table])
    work.path.unlink()
    rows = tables["geometry"]
    beside = {
        "bands": band_summary(tables["bands"], bands),
        "suite": suite_summary(rows),
        "pairs": pair_summary(tables["pairs"]),
    }
    found = summarise(rows, Thresholds(rotation, none), bootstrap=bootstrap, seed=seed, references=references)
    return found | {name: [_json(row) for row in table] for name, table in beside.items()}


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
        "rows": [_json(group) for group in groups],
        "controls": [_json(control) for control in controls],
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


def _json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: defined(value) if isinstance(value, float) else value for key, value in row.items()}


def _check(
    experts: Mapping[str, Checkpoint],
    planted: Sequence[float],
    principal: float,
    bands: Sequence[float],
    references: Sequence[str],
    dtype: str,
) -> None:
    if dtype not in ("float64", "float32"):
        raise ConfigError(f"evidence.geometry.dtype: {dtype!r} is not float64 or float32")
    if outside := [fraction for fraction in planted if not 0 <= fraction <= 1]:
        raise ConfigError(f"evidence.geometry.planted: {outside[0]} is not a fraction; give values from 0 to 1")
    if not 0 < principal <= 1:
        raise ConfigError(f"evidence.geometry.principal: {principal} is not a share; give a value in (0, 1]")
    if list(bands) != sorted({edge for edge in bands if 0 < edge < 1}):
        raise ConfigError(f"evidence.geometry.bands: {list(bands)} are no rising edges between 0 and 1")
    if unknown := [name for name in references if name not in experts]:
        raise ConfigError(f"references: no model {unknown[0]!r}; one of: {', '.join(experts)}")


def torch_device(chosen: str) -> str:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that is not here."""
    import torch

    if chosen == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"evidence.geometry.device: {chosen!r} is not here; choose auto or cpu") from error
    return chosen
