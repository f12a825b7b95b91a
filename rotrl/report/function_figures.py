"""Figures of what the parts of an update do: share of the KL gap to the expert that is closed, beside the controls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rotrl.report.evidence_figures import Row, in_order, read_rows
from rotrl.report.paint import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, VERMILION

NUMBERS = ("energy", "taken", "kl", "score", "low", "high")
# part: what it is called, marker, colour; hollow marks are controls.
PARTS = {
    "tangent": ("tangent part", "o", BLUE),
    "rotation": ("finite rotation", "s", BLUE),
    "complement": ("the rest", "D", VERMILION),
    "vectors": ("its vectors, base's values", "^", GREEN),
    "values": ("base's vectors, its values", "v", PURPLE),
}
CONTROLS = {
    "scaled": ("whole update, scaled", "P", ORANGE),
    "plane": ("random directions of its planes", "o", SKY),
    "part": ("random parts of the update", "s", SKY),
    "random": ("random rotations", "X", MUTED),
    "vectors_control": ("control of the vectors", "^", GREEN),
    "values_control": ("control of the values", "v", PURPLE),
}


def parts(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """Share of the gap that each part closes against its share of the energy."""
    rows = _rows(run_dir)
    if not any(row["part"] in PARTS for row in rows):
        return None
    figure, panels = _panels(rows, record, 4.9)
    for name, axes in panels.items():
        own = {row["part"]: row for row in rows if row["expert"] == name}
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9)
        axes.annotate("as its energy", (52, 50), color=MUTED, rotation=45, ha="center", va="top", fontsize=9)
        doses = [row for part, row in own.items() if part.startswith("update_")]
        if doses:
            doses = sorted([*doses, *(own[part] for part in ("scaled",) if part in own)], key=lambda row: row["energy"])
            curve = [(0.0, 0.0), *((row["energy"], row["score"]) for row in doses if row["energy"] <= 1.001)]
            axes.plot(*(100 * np.array(curve)).T, color=ORANGE, linewidth=1.0, linestyle=(0, (4, 3)))
        for known, hollow in ((PARTS, False), (CONTROLS, True)):
            for part, (label, marker, colour) in known.items():
                if part in own:
                    _mark(axes, own[part], 100 * own[part]["energy"], label, marker, colour, hollow=hollow)
        axes.set(xlabel="energy of the part, % of the update's", xlim=(-4, 106), ylim=(-12, 106))
        axes.set_title(name)
    return _finished(figure, panels, 4)


def dose_response(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """Share of the gap closed along the update, W0 + t D, and along its rotation, R^t W0."""
    rows = [row for row in _rows(run_dir) if row["part"].startswith(("update_", "rotation_"))]
    if not rows:
        return None
    figure, panels = _panels(rows, record, 4.3)
    for name, axes in panels.items():
        for kind, label, marker, colour in (
            ("update", "update, W + tD", "o", ORANGE),
            ("rotation", "rotation, R^t W", "s", BLUE),
        ):
            own = [row for row in rows if row["expert"] == name and row["part"].startswith(f"{kind}_")]
            own = sorted(own, key=lambda row: float(row["part"].partition("_")[2]))
            x = [float(row["part"].partition("_")[2]) for row in own]
            y, low, high = (100 * np.array([row[key] for row in own]) for key in ("score", "low", "high"))
            bars = np.clip([y - low, high - y], 0, None)
            axes.errorbar(x, y, bars, fmt=f"{marker}-", color=colour, markersize=5, elinewidth=1.2, label=label)
        axes.axhline(100, color=INK, linewidth=0.9)
        axes.set(xlabel="dose t, share of update or angles", xlim=(0, None), ylim=(min(0, *axes.get_ylim()), 106))
        axes.set_title(name)
    return _finished(figure, panels, 2)


def restored(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """What is left of the skill once the base's singular vectors are put back, beside as much energy taken out."""
    rows = [row for row in _rows(run_dir) if row["part"].startswith(("ranks_", "layers_"))]
    if not rows:
        return None
    figure, panels = _panels(rows, record, 4.3)
    for name, axes in panels.items():
        own = {row["part"]: row for row in rows if row["expert"] == name}
        names = [part for part in own if not part.endswith("_control")]
        for i, part in enumerate(names):
            label, other = (None, None) if i else ("vectors put back", "as much energy taken out anywhere")
            _mark(axes, own[part], i - 0.12, label, "o", BLUE, hollow=False)
            control = own.get(f"{part}_control")
            if control:
                _mark(axes, control, i + 0.12, other, "s", SKY, hollow=True)
        axes.axhline(100, color=INK, linewidth=0.9)
        axes.set_xticks(range(len(names)), [part.replace("_", "\n") + " %" for part in names], fontsize=8)
        axes.set_title(name)
    return _finished(figure, panels, 2)


def _rows(run_dir: Path) -> list[Row]:
    rows = read_rows(run_dir, "function", NUMBERS)
    return [row for row in rows if row["score"] is not None and row["energy"] is not None]


def _panels(rows: list[Row], record: Mapping[str, Any], height: float) -> tuple[Figure, dict[str, Axes]]:
    names = in_order(rows, record)
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, height * lines))
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    panels = dict(zip(names, grid, strict=False))
    for axes in list(grid)[len(names) :]:
        axes.set_axis_off()
    return figure, panels


def _mark(axes: Axes, row: Row, x: float, label: str | None, marker: str, colour: str, *, hollow: bool) -> None:
    y, low, high = (100 * (row[key] if row[key] is not None else row["score"]) for key in ("score", "low", "high"))
    axes.errorbar(
        [x],
        [y],
        np.clip([[y - low], [high - y]], 0, None),
        fmt=marker,
        color=colour,
        markerfacecolor="none" if hollow else colour,
        markersize=9 if hollow else 6,
        zorder=4 if hollow else 3,
        elinewidth=1.2,
        label=label,
    )


def _finished(figure: Figure, panels: dict[str, Axes], columns: int) -> Figure:
    first = next(iter(panels.values()))
    first.set_ylabel("KL gap to the expert closed, %")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure
