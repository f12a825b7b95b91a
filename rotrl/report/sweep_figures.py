"""The figure of a multirun: scores against the number that was swept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rotrl.report.curves import in_words
from rotrl.report.paint import INK, MARKERS, MUTED, PALETTE, VEIL

SHOWN = len(PALETTE)  # curves that can be told apart; the best ones, the table has all


def curves(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """A line for each merge that the number changes, bars over problems, bands over seeds; dashed: the best that it
    does not change, and the experts."""
    found = record.get("curves") or {}
    moving = [rows for rows in _by_model(found.get("rows") or []).values() if len(rows) > 1]
    if not moving:
        return None
    best = sorted(moving, key=lambda rows: -max(row["mean"] for row in rows))[:SHOWN]
    drawn = sorted(best, key=lambda rows: -rows[-1]["mean"])
    figure = Figure(figsize=(7.8, 4.8))
    axes = figure.subplots()
    places = _places(axes, found["values"], found["key"])
    for i, (rows, colour, marker) in enumerate(zip(drawn, PALETTE, MARKERS, strict=False)):
        aside = (i - (len(drawn) - 1) / 2) * 0.05  # bars beside each other
        at = [places[row["value"]] + aside for row in rows]
        means = [100 * row["mean"] for row in rows]
        axes.plot(at, means, marker=marker, color=colour, markersize=6, label=rows[0]["model"], zorder=3)
        if all(row["low"] is not None for row in rows):
            arms = [[100 * (r["mean"] - r["low"]) for r in rows], [100 * (r["high"] - r["mean"]) for r in rows]]
            axes.errorbar(at, means, yerr=arms, fmt="none", ecolor=colour, elinewidth=0.9, zorder=2)
        if any(row["jobs"] > 1 for row in rows):
            low, high = ([100 * row[end] for row in rows] for end in ("lowest", "highest"))
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)
    _levels(axes, found)
    axes.set_ylabel("mean over tasks, %")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _by_model(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["role"] == "merge":
            found.setdefault(row["model"], []).append(row)
    return found


def _places(axes: Axes, values: Sequence[str], key: str) -> dict[str, float]:
    """Values at equal distances, as they were chosen."""
    axes.set_xticks(range(len(values)), [in_words(value) for value in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(key)
    return {value: float(place) for place, value in enumerate(values)}


def _levels(axes: Axes, found: Mapping[str, Any]) -> None:
    still = [row for row in found["rows"] if row["role"] == "merge" and row["value"] == ""]
    top = max(still, key=lambda row: row["mean"], default=None)
    levels = [(top["mean"], f"{top['model']}, the same at any {found['key']}", INK)] if top else []
    if found["ceiling"] is not None:
        levels.append((found["ceiling"], "each expert on its own task", MUTED))
    for level, told, colour in levels:
        axes.axhline(100 * level, color=colour, linestyle=(0, (4, 3)), linewidth=1)
        at = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(told, (0.995, 100 * level), ha="right", fontsize=8, color=colour, bbox=VEIL, zorder=4, **at)
