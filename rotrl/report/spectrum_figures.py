"""Figures of the evidence that need more than a share: angles over the spectrum, and what a kappa means."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rotrl.report.evidence_figures import SIDES, Row, geometry_rows, in_order, modules, read_rows
from rotrl.report.paint import INK, MARKERS, MUTED, RULE, colours
from rotrl.report.standings import experts, number

PLANTED = "planted_"


def angle_spectra(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """Angle by which each tenth of the singular directions turns on the smaller side, beside that of noise."""
    rows = [row for row in read_rows(run_dir, "bands", BANDS) if round(row["stop"] - row["start"], 6) == 0.1]
    sides = {(r["expert"], r["tensor"]): _small_side(r) for r in geometry_rows(run_dir)}
    rows = [row for row in rows if row["side"] == sides.get((row["expert"], row["tensor"]))]
    if not rows:
        return None
    panels = modules(rows)[:8]
    names = in_order(rows, record)
    shown = [name for name in names if name in experts(record)] or names
    colour = colours(shown)
    figure = Figure(figsize=(9.2, 5.2))
    grid = figure.subplots(2, 4, sharex=True, squeeze=False)
    for axes, module in zip(grid.flat, panels, strict=False):
        for i, name in enumerate(shown):
            own = [row for row in rows if (row["expert"], row["module"]) == (name, module)]
            x, angle, noise = _over_spectrum(own)
            axes.plot(x, noise, color=colour[name], linewidth=1.0, linestyle=(0, (4, 3)))
            axes.plot(x, angle, MARKERS[i % len(MARKERS)], color=colour[name], markersize=4.5, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        side = next(row["side"] for row in rows if row["module"] == module)
        axes.set_title(f"{module}, {side}", fontsize=10)
        axes.tick_params(axis="y", which="both", labelsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("angle, degrees")
    for axes in list(grid.flat)[max(0, len(panels) - 4) : len(panels)]:
        axes.set_xlabel("singular directions, %", fontsize=9)
        axes.tick_params(labelbottom=True)
    handles, labels = grid[0][0].get_legend_handles_labels()
    line = grid[0][0].plot([], [], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))[0]
    figure.legend(
        [*handles, line], [*labels, "noise of the same norm"], loc="outside lower center", ncols=len(labels) + 1
    )
    return figure


def calibration(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """kappa of the sign-flipped update with a known share of rotation planted, and where the updates themselves lie."""
    rows = [row for row in geometry_rows(run_dir) if row["kappa"] is not None]
    planted = [row for row in rows if row["control"].startswith(PLANTED)]
    real = [row for row in rows if not row["control"]]
    if not planted:
        return None
    names = in_order(real, record)
    figure = Figure(figsize=(9.2, 4.3))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, side in zip(panels, SIDES, strict=True):
        at: dict[float, list[float]] = {}
        for row in planted:
            if row["side"] == side:
                at.setdefault(100 * float(row["control"].removeprefix(PLANTED)), []).append(row["kappa"])
        x = sorted(at)
        low, middle, high = (np.array([np.quantile(at[key], q) for key in x]) for q in (0.1, 0.5, 0.9))
        axes.fill_between(x, low, high, color=RULE, linewidth=0, label="8 in 10 matrices")
        axes.plot(x, middle, "o-", color=INK, markersize=4, linewidth=1.2, label="planted, median")
        for i, (name, colour) in enumerate(colours(names).items()):
            kappas = [row["kappa"] for row in real if (row["expert"], row["side"]) == (name, side)]
            if kappas:  # dashes take turns, so that lines at one height all show
                dashes = (5 * i, (4, 5 * len(names) - 4))
                axes.axhline(float(np.median(kappas)), color=colour, linewidth=1.8, linestyle=dashes)
                axes.plot([], [], color=colour, linewidth=1.8, label=name)
        axes.set(xlabel="rotation planted, % of the update's energy", xlim=(0, 100))
        axes.set_title(f"{side} rotation")
    panels[0].set_ylabel("kappa")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


BANDS = ("start", "stop", "angle", "angle_noise", "kappa", "layer")


def _small_side(row: Row) -> str:
    return "left" if (number(row["rows"]) or 0) <= (number(row["cols"]) or 0) else "right"


def _over_spectrum(rows: Sequence[Row]) -> tuple[list[float], list[float], list[float]]:
    """Medians over the layers at the middle of each band, in percent of the directions."""
    starts = sorted({row["start"] for row in rows})
    at = [[row for row in rows if row["start"] == start] for start in starts]
    angle, noise = ([float(np.median([row[key] for row in band])) for band in at] for key in ("angle", "angle_noise"))
    return [100 * start + 5 for start in starts], angle, noise
