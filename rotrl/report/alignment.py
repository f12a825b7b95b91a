"""What an alignment learned: sentences, and its table of matrices by kind and over depth."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rotrl.report.evidence_figures import modules
from rotrl.report.paint import MARKERS, MUTED, PALETTE
from rotrl.report.standings import number
from rotrl.report.words import percent, signed

FIGURES = ("layer", "angle_rms", "angle_max", "explained", "change")  # columns that hold numbers
Row = dict[str, Any]


def matrices(run_dir: Path) -> list[Row]:
    """The rows of align.csv with numbers as numbers, None where a cell is empty; [] where there is none."""
    path = Path(run_dir) / "align.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{**row, **{key: number(row.get(key)) for key in FIGURES}} for row in csv.DictReader(file)]


def by_module(rows: Sequence[Row]) -> list[Row]:
    """A row for each kind of matrix and side: rms and largest angle, medians of share and length of the change."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["module"], row["side"]), []).append(row)
    order = modules(rows)
    found = []
    for (module, side), own in sorted(groups.items(), key=lambda group: (order.index(group[0][0]), group[0][1])):
        known = {key: np.array([row[key] for row in own if row[key] is not None]) for key in FIGURES}
        angles, largest = known["angle_rms"], known["angle_max"]
        found.append(
            {
                "module": module,
                "side": side,
                "matrices": len(own),
                "angle_rms": float(np.sqrt(np.mean(angles**2))) if len(angles) else None,
                "angle_max": float(largest.max()) if len(largest) else None,
                **{key: float(np.median(known[key])) if len(known[key]) else None for key in ("explained", "change")},
            }
        )
    return found


def sentences(align: Mapping[str, Any]) -> list[str]:
    """How near the model came to its teachers, what the weights did meanwhile, and what came of the controls."""
    words = []
    before, after = align.get("kl_before") or {}, align.get("kl_after") or {}
    near = []
    for name, kl in after.items():
        first, last = number(before.get(name)), number(kl)
        if first and last is not None:
            near.append(f"{name} {first:.4f} before, {last:.4f} after ({signed(100 * (last / first - 1))} %)")
    if near:
        words.append(f"KL from each teacher, nats per token on held-out problems: {'; '.join(near)}.")
    explained, closed = number(align.get("explained")), number(align.get("closed_form"))
    if explained is not None:
        far = f"of the squared distance to the {'mean of the teachers' if len(after) > 1 else 'teacher'}'s weights"
        best = f"; the nearest rotations (Procrustes) remove {percent(closed)} %" if closed is not None else ""
        words.append(
            f"The weights went {percent(number(align.get('change')), 2)} % of their length and removed "
            f"{signed(100 * explained)} % {far}{best}."
        )
    for label, control in (align.get("controls") or {}).items():
        ends = ", ".join(f"{name} {float(kl):.4f}" for name, kl in (control.get("kl_after") or {}).items())
        size = f"{control['parameters']:,} parameters" if control.get("parameters") else "none"
        words.append(f"Control {label}, the same fit by {control.get('parametrization')} ({size}), ends at {ends}.")
    return words


def by_layer(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """Every matrix over depth: angle of its rotation, or length of its change, and the share of the update removed."""
    rows = [row for row in matrices(run_dir) if row["layer"] is not None]
    if not rows:
        return None
    turned = any(row["angle_rms"] is not None for row in rows)
    figure = Figure(figsize=(9.2, 3.9))
    panels = figure.subplots(1, 2, sharex=True)
    first = ("angle_rms", 1.0, "rms angle, degrees") if turned else ("change", 100.0, "change of the weights, %")
    sides = sorted({row["side"] for row in rows})
    for axes, (key, unit, label) in zip(panels, (first, ("explained", 100.0, "update removed, %")), strict=True):
        for k, module in enumerate(modules(rows)):
            for side in sides:
                own = [r for r in rows if (r["module"], r["side"]) == (module, side) and r[key] is not None]
                _line(axes, own, key, unit, k, hollow=len(sides) > 1 and side == "left")
        axes.set(xlabel="layer", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].axhline(0, color=MUTED, linewidth=0.8)
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=7)
    return figure


def _line(axes: Axes, rows: Sequence[Row], key: str, unit: float, k: int, *, hollow: bool) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["layer"])
    colour = PALETTE[k % len(PALETTE)]
    face = "none" if hollow else colour
    x, y = [row["layer"] for row in rows], [unit * row[key] for row in rows]
    label = " ".join(part for part in (rows[0]["module"], rows[0]["side"]) if part)
    look = {"marker": MARKERS[k % len(MARKERS)], "markersize": 5, "markerfacecolor": face, "linewidth": 0.8}
    axes.plot(x, y, color=colour, label=label, **look)
