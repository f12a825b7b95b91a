"""Figures of the evidence: every share beside its null."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rotrl.report.paint import INK, MARKERS, MODULES, MUTED, PALETTE, RULE, colours
from rotrl.report.standings import experts, number

SIDES = ("left", "right")
MANY = 2000  # marks beyond which an SVG holds them as one picture
Row = dict[str, Any]


def share_vs_null(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """Share of the update's energy that a one-sided rotation explains, against what its sign flips would show."""
    rows = geometry_rows(run_dir)
    real = [row for row in rows if not row["control"]]
    if not real:
        return None
    names = in_order(real, record)
    others = (record.get("models") or {}).get("others") or {}
    trained = [name for name in names if name in experts(record) or name in others] or names
    colour = colours(trained)
    figure = Figure(figsize=(9.2, 4.9))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, side in zip(panels, SIDES, strict=True):
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9)
        at = [row for row in rows if row["side"] == side]
        noise = [r for r in at if (r["control"] and not r["control"].startswith("planted")) or _untrained(r, trained)]
        _marks(axes, noise, ".", MUTED, "controls", size=9, zorder=2)
        exact = [r for r in at if number(r["control"].removeprefix("planted_")) == 1.0 and r["expert"] in trained]
        _marks(axes, exact, "_", MUTED, "planted rotation", size=26, zorder=2)
        for i, name in enumerate(trained):
            own = [row for row in at if row["expert"] == name and not row["control"]]
            _marks(axes, own, MARKERS[i % len(MARKERS)], colour[name], name, size=30, zorder=3)
        _name_groups(axes, [row for row in at if not row["control"]])
        axes.set(xlim=(0, 100), ylim=(0, 104), aspect="equal", xlabel="expected of its sign flips (null), %")
        axes.set_title(f"{side} rotation, {'R W' if side == 'left' else 'W R'}")
    panels[0].set_ylabel("explained by a rotation, %")
    panels[0].annotate("rotation", (12, 70), color=MUTED, rotation=45, ha="center", va="center")
    panels[0].annotate("stretch", (88, 28), color=MUTED, rotation=45, ha="center", va="center")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def kappa_by_layer(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """kappa = (share - null)/(1 - null) of every matrix over depth, with the thresholds that were fixed beforehand."""
    rows = [row for row in geometry_rows(run_dir) if not row["control"] and row["kappa"] is not None]
    rows = [row for row in rows if row["layer"] is not None]
    if not rows:
        return None
    names, thresholds = in_order(rows, record), (record.get("geometry") or {}).get("thresholds") or {}
    rotation, none = number(thresholds.get("rotation")) or 0.5, number(thresholds.get("none")) or 0.05
    figure = Figure(figsize=(9.2, 1.0 + 2.0 * len(names)))
    grid = figure.subplots(len(names), 2, sharex=True, sharey=True, squeeze=False)
    layers, shown = sorted({row["layer"] for row in rows}), modules(rows)
    dodge = 0.09 if len(layers) <= 8 else 0.0
    for (i, name), (j, side) in ((a, b) for a in enumerate(names) for b in enumerate(SIDES)):
        axes = grid[i][j]
        axes.axhspan(-none, none, color=RULE, alpha=0.6, linewidth=0)
        axes.axhline(rotation, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for k, module in enumerate(shown):
            own = [r for r in rows if (r["expert"], r["side"], r["module"]) == (name, side, module)]
            _depth_line(axes, own, k, dodge * (k - len(shown) // 2))
        axes.set_title(f"{name}, {side}", fontsize=10)
        if j == 0:
            axes.set_ylabel("kappa")
    values = [row[key] for row in rows for key in ("kappa", "kappa_low", "kappa_high") if row[key] is not None]
    grid[0][0].set_ylim(min(-0.15, 1.15 * min(values)), max(rotation + 0.1, 1.1 * max(values)))
    grid[0][0].annotate(
        f"a rotation from {rotation:g}", (0.01, rotation), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
    )
    grid[0][0].annotate(
        f"none within ±{none:g}", (0.01, none), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
    )
    for axes in grid[-1]:
        axes.set_xlabel("layer")
        if dodge:
            axes.set_xticks(layers)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)
    return figure


def geometry_rows(run_dir: Path) -> list[Row]:
    """evidence/geometry.csv with numbers as numbers; rows without a share (unmoved matrices) are left out."""
    rows = read_rows(run_dir, "geometry", ("share", "null", "kappa", "kappa_low", "kappa_high", "layer"))
    for row in rows:
        row["control"] = row.get("control") or ""
    return [row for row in rows if row["share"] is not None and row["null"] is not None]


def read_rows(run_dir: Path, name: str, numbers: Sequence[str]) -> list[Row]:
    """A table of the evidence with the named columns as numbers, None where a cell is empty; [] where there is none."""
    path = Path(run_dir) / "evidence" / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        row |= {key: number(row.get(key)) for key in numbers}
    return rows


def in_order(rows: Sequence[Row], record: Mapping[str, Any]) -> list[str]:
    """Experts first, in their order, then the models that serve as controls."""
    found = list(dict.fromkeys(row["expert"] for row in rows))
    return sorted(found, key=lambda name: (name not in experts(record), found.index(name)))


def _untrained(row: Row, trained: Sequence[str]) -> bool:
    return not row["control"] and row["expert"] not in trained


def _marks(axes: Axes, rows: Sequence[Row], marker: str, colour: str, label: str, *, size: float, zorder: int) -> None:
    if rows:
        x, y = (100 * np.array([row[key] for row in rows]) for key in ("null", "share"))
        hollow = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.1}  # what lies below stays visible
        look = hollow if marker not in "._" else {"c": colour, "linewidths": 1.2}
        many = len(rows) > MANY
        axes.scatter(x, y, size, marker=marker, label=label, zorder=zorder, rasterized=many, **look)


def _name_groups(axes: Axes, rows: Sequence[Row]) -> None:
    """Names of the modules under their cluster; modules of one shape share a cluster."""
    known = modules(rows)
    null = {m: 100 * float(np.median([r["null"] for r in rows if r["module"] == m])) for m in known}
    groups: list[list[str]] = []
    for module in sorted(null, key=lambda m: null[m]):
        if groups and null[module] - null[groups[-1][0]] < 7:
            groups[-1].append(module)
        else:
            groups.append([module])
    for group in groups:
        at = [100 * float(np.median([r[key] for r in rows if r["module"] in group])) for key in ("null", "share")]
        names = ", ".join(sorted(group, key=known.index))
        axes.annotate(names, (at[0], at[1]), (20, -20), textcoords="offset points", ha="center", va="top", fontsize=9)


def modules(rows: Sequence[Row]) -> list[str]:
    """Those of a decoder layer in their order, then fused ones and what has no name of its own."""
    found = dict.fromkeys(row["module"] for row in rows)
    return [module for module in MODULES if module in found] + [module for module in found if module not in MODULES]


def _depth_line(axes: Axes, rows: Sequence[Row], k: int, shift: float) -> None:
    rows = sorted(rows, key=lambda row: row["layer"])
    if not rows:
        return
    x, y = np.array([row["layer"] + shift for row in rows]), np.array([row["kappa"] for row in rows])
    low = np.array([row["kappa_low"] if row["kappa_low"] is not None else row["kappa"] for row in rows])
    high = np.array([row["kappa_high"] if row["kappa_high"] is not None else row["kappa"] for row in rows])
    axes.errorbar(
        x,
        y,
        yerr=np.clip([y - low, high - y], 0, None),
        fmt=MARKERS[k % len(MARKERS)],
        markersize=4 if shift or len(rows) < 9 else 2.5,
        color=PALETTE[k % len(PALETTE)],
        elinewidth=0.8,
        linewidth=0.8,
        linestyle="-" if len(rows) > 8 else "none",
        label=rows[0]["module"],
    )
