"""Is the update a rotation? Every measure on every matrix, beside its controls, and a verdict by stated thresholds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.errors import CheckpointError, ConfigError
from rotrl.evidence.bands import COLUMNS as BANDS
from rotrl.evidence.batches import batches
from rotrl.evidence.beside import band_summary, pair_summary, suite_summary
from rotrl.evidence.measure import COLUMNS, Row, Settings, measure
from rotrl.evidence.nulls import CONTROLS, check_controls
from rotrl.evidence.pairs import COLUMNS as PAIRS
from rotrl.evidence.summary import summarise
from rotrl.evidence.table import Work, plain, write_table
from rotrl.evidence.verdict import Thresholds

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
    batch: int | str = "auto",
    references: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures base -> each expert on all attention and MLP matrices; gives the summary and writes, below out,
    geometry.csv, bands.csv (by parts of the spectrum: bands.band_rows) and pairs.csv (two experts: pairs.pair_row).

    In geometry.csv one row a matrix, expert and side; `control` is "" for the real update, a control's name, or
    planted_<fraction>. kappa_low and kappa_high are kappa -+ 1.96 standard deviations over the sign-flip null;
    two_sided is the share of rotations on both sides at once, which all but 1 / max(m, n) of any update is. The
    summary holds medians with bootstrap intervals over layers, the planted fraction that would show the same kappa, and
    verdicts. Experts named in `references` (an SFT of the same base, say) are those that the others must differ from to
    be special. Rows are kept by matrix in out/geometry.work.jsonl until all are there: a call that was killed goes on
    from it. Raises ConfigError on unknown names or settings out of range, CheckpointError if the models don't fit.
    """
    settings = Settings(seed, list(controls), list(planted), principal, dtype, list(bands))
    _check(settings, experts, references, batch)
    where = torch_device(device)
    check_family(base, experts)
    tables = _measured(base, experts, out, settings, where, batch, progress)
    rows = tables["geometry"]
    beside = {
        "bands": band_summary(tables["bands"], bands),
        "suite": suite_summary(rows),
        "pairs": pair_summary(tables["pairs"]),
    }
    found = summarise(rows, Thresholds(rotation, none), bootstrap=bootstrap, seed=seed, references=references)
    return found | {name: [plain(row) for row in table] for name, table in beside.items()}


def _measured(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    out: Path,
    settings: Settings,
    device: str,
    batch: int | str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[Row]]:
    """{table: rows} in the order of the tensors, written to out; what an earlier call has measured is taken over."""
    roles = {name: role for name, info in base.tensors.items() if (role := role_of(name, info.shape)).is_matrix}
    if not roles:
        raise CheckpointError(f"{base.path}: no tensor is named like a matrix of attention or MLP (..._proj.weight)")
    inputs = {name: model.sha256 for name, model in {"": base, **experts}.items()}
    work = Work(out / "geometry.work.jsonl", [settings._asdict(), torch.device(device).type, inputs])
    shapes = {name: base.tensors[name].shape for name in roles if name not in work.rows}
    dtype = getattr(torch, settings.dtype)
    for names in batches(shapes, updates=len(experts), dtype=dtype, device=device, batch=batch):
        W0 = torch.stack([base.read(name) for name in names])
        tuned = {expert: torch.stack([model.read(name) for name in names]) for expert, model in experts.items()}
        for name, found in measure(W0, tuned, names, settings, device).items():
            about = {"layer": roles[name].layer, "module": roles[name].module}
            work.add(name, [about | row | {"table": table} for table, rows in found.items() for row in rows])
        if progress:
            progress(len(work.rows), len(roles))
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    for name in roles:
        for row in work.rows[name]:
            tables[row["table"]].append({key: value for key, value in row.items() if key != "table"})
    for table, columns in TABLES.items():
        if tables[table]:
            write_table(out / f"{table}.csv", columns, tables[table])
    work.path.unlink()
    return tables


def _check(settings: Settings, experts: Mapping[str, Checkpoint], references: Sequence[str], batch: int | str) -> None:
    check_controls(settings.controls)
    if settings.dtype not in ("float64", "float32"):
        raise ConfigError(f"evidence.geometry.dtype: {settings.dtype!r} is not float64 or float32")
    if outside := [fraction for fraction in settings.planted if not 0 <= fraction <= 1]:
        raise ConfigError(f"evidence.geometry.planted: {outside[0]} is not a fraction; give values from 0 to 1")
    if not 0 < settings.principal <= 1:
        raise ConfigError(f"evidence.geometry.principal: {settings.principal} is not a share; give a value in (0, 1]")
    if settings.bands != sorted({edge for edge in settings.bands if 0 < edge < 1}):
        raise ConfigError(f"evidence.geometry.bands: {settings.bands} are no rising edges between 0 and 1")
    if batch != "auto" and not (isinstance(batch, int) and batch > 0):
        raise ConfigError(f"evidence.geometry.batch: {batch!r} is not auto or a number of matrices")
    if unknown := [name for name in references if name not in experts]:
        raise ConfigError(f"references: no model {unknown[0]!r}; one of: {', '.join(experts)}")


def torch_device(chosen: str) -> str:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that is not here."""
    if chosen == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"evidence.geometry.device: {chosen!r} is not here; choose auto or cpu") from error
    return chosen
