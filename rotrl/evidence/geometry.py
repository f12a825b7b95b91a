"""Is the update a rotation? Every measure on every matrix, beside its controls, and a verdict by stated thresholds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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
from rotrl.values import Count, Density, Part, Share, faults_of

TABLES = {"geometry": COLUMNS, "bands": BANDS, "pairs": PAIRS}


def geometry(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    out: Path,
    *,
    seed: int = 0,
    controls: Sequence[str] = tuple(CONTROLS),
    planted: Sequence[Share] = (0.0, 0.1, 0.3, 0.5, 1.0),
    principal: Density = 0.1,
    bootstrap: Count = 1000,
    rotation: Share = 0.5,
    none: Share = 0.05,
    bands: Sequence[Part] = (0.1, 0.9),
    dtype: Literal["float64", "float32"] = "float64",
    device: str = "auto",
    batch: Count | Literal["auto"] = "auto",
    references: Sequence[str] = (),
    others: Mapping[str, tuple[Checkpoint, Checkpoint]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures base -> each expert on all attention and MLP matrices; gives the summary and writes, below out,
    geometry.csv, bands.csv (by parts of the spectrum: bands.band_rows) and pairs.csv (two experts: pairs.pair_row).

    In geometry.csv one row a matrix, expert and side; `control` is "" for the real update, a control's name, or
    planted_<fraction>. kappa_low and kappa_high are kappa -+ 1.96 standard deviations over the sign-flip null;
    two_sided is the share of rotations on both sides at once, which all but 1 / max(m, n) of any update is. The
    summary holds medians with bootstrap intervals over layers, the planted fraction that would show the same kappa, and
    verdicts. Experts named in `references` (an SFT of the same base, say) are those that the others must differ from to
    be special; `others` are {name: (a base of its own, the model tuned from it)}, measured alike to stand beside. Rows
    are kept by matrix in out/geometry*.work.jsonl until all are there: a call that was killed goes on from them. Raises
    ConfigError on unknown names or settings out of range, CheckpointError if the models don't fit.
    """
    settings = Settings(seed, list(controls), list(planted), principal, dtype, list(bands))
    check({**settings._asdict(), "batch": batch, "device": device})
    if unknown := [name for name in references if name not in experts]:
        raise ConfigError(f"references: no model {unknown[0]!r}; one of: {', '.join(experts)}")
    where = torch_device(device)
    families = [Family(base, experts), *(Family(root, {name: tuned}) for name, (root, tuned) in (others or {}).items())]
    tables = _measured(families, out, settings, where, batch, progress)
    rows = tables["geometry"]
    beside = {
        "bands": band_summary(tables["bands"], bands),
        "suite": suite_summary(rows),
        "pairs": pair_summary(tables["pairs"]),
    }
    found = summarise(rows, Thresholds(rotation, none), bootstrap=bootstrap, seed=seed, references=references)
    return found | {name: [plain(row) for row in table] for name, table in beside.items()}


class Family:
    """A base, what was tuned from it, and the roles of their matrices. Raises CheckpointError where they don't fit."""

    def __init__(self, base: Checkpoint, tuned: Mapping[str, Checkpoint]) -> None:
        check_family(base, tuned)
        self.base, self.tuned = base, tuned
        self.roles = {
            name: role for name, info in base.tensors.items() if (role := role_of(name, info.shape)).is_matrix
        }
        if not self.roles:
            raise CheckpointError(
                f"{base.path}: no tensor is named like a matrix of attention or MLP (..._proj.weight)"
            )

    @property
    def sha256(self) -> dict[str, str]:
        return {name: model.sha256 for name, model in {"": self.base, **self.tuned}.items()}


def _measured(
    families: Sequence[Family],
    out: Path,
    settings: Settings,
    device: str,
    batch: int | str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[Row]]:
    """{table: rows} in the order of the tensors, written to out; what an earlier call has measured is taken over."""
    kind, tables = torch.device(device).type, {name: [] for name in TABLES}
    names = [out / f"geometry{i or ''}.work.jsonl" for i in range(len(families))]
    works = [
        Work(name, [settings._asdict(), kind, family.sha256]) for name, family in zip(names, families, strict=True)
    ]
    for family, work in zip(families, works, strict=True):
        for _ in _measure(family, work, settings, device, batch):
            if progress:
                progress(sum(len(each.rows) for each in works), sum(len(each.roles) for each in families))
        for row in (row for name in family.roles for row in work.rows[name]):
            tables[row["table"]].append({key: value for key, value in row.items() if key != "table"})
    for table, columns in TABLES.items():
        if tables[table]:
            write_table(out / f"{table}.csv", columns, tables[table])
    for work in works:
        work.path.unlink(missing_ok=True)
    return tables


def _measure(family: Family, work: Work, settings: Settings, device: str, batch: int | str) -> Iterator[Sequence[str]]:
    """Measures what is not there yet; gives the names of every batch once its rows are kept."""
    shapes = {name: family.base.tensors[name].shape for name in family.roles if name not in work.rows}
    dtype = getattr(torch, settings.dtype)
    for names in batches(shapes, updates=len(family.tuned), dtype=dtype, device=device, batch=batch):
        W0 = torch.stack([family.base.read(name) for name in names])
        tuned = {one: torch.stack([model.read(name) for name in names]) for one, model in family.tuned.items()}
        for name, found in measure(W0, tuned, names, settings, device).items():
            about = {"layer": family.roles[name].layer, "module": family.roles[name].module}
            work.add(name, [about | row | {"table": table} for table, rows in found.items() for row in rows])
        yield names


def check(given: Mapping[str, Any]) -> None:
    """Raises ConfigError on keywords of `geometry` that it can't follow."""
    check_controls(given["controls"])
    torch_device(given["device"])
    bands, faults = list(given["bands"]), faults_of(geometry, given, "evidence.geometry")
    if not faults and bands != sorted(set(bands)):
        faults.append(f"evidence.geometry.bands: {bands} are no rising edges between 0 and 1")
    if faults:
        raise ConfigError("; ".join(faults))


def torch_device(chosen: str) -> str:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that is not here."""
    if chosen == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"evidence.geometry.device: {chosen!r} is not here; choose auto or cpu") from error
    return chosen
