"""Figures of the scores and of the learned rotation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rotrl.report.labels import place
from rotrl.report.paint import INK, MUTED, ORANGE, PAPER, PURPLE, SKY, VEIL, colours
from rotrl.report.standings import Interval, Row, Standings, experts, number, standings

DOTS, FRONT = (0, (1, 2)), "#9aa3ad"


def tasks_scatter(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """Both tasks against each other with 95 % intervals over problems; merges that crowd get a panel of theirs."""
    table = standings(record)
    rows = [row for row in table.rows if row.mean]
    if len(table.tasks) != 2 or len(rows) < 2:
        return None
    merges, looks = [row for row in rows if row.role == "merge"], _looks(table, record)
    near = _crowded(_at(merges, table), _at(rows, table))
    figure = Figure(figsize=(10.4, 5.2) if near else (7.8, 6.2))
    panels = figure.subplots(1, 2, width_ratios=(1, 1.25)) if near else [figure.subplots()]
    figure.legend(handles=_legend(table), loc="outside lower center", ncols=4)
    for axes, shown in zip(panels, (rows, merges), strict=False):
        _scatter(axes, shown, table, looks)
        axes.set(xlabel=_axis(table, 0), ylabel=_axis(table, 1))
    if near:
        panels[0].set_title("all models")
        panels[1].set_title("the merges alone")
        (x0, y0), (x1, y1) = near
        panels[0].indicate_inset((x0, y0, x1 - x0, y1 - y0), edgecolor=MUTED, alpha=1.0)
    figure.draw_without_rendering()  # settles the layout, in which the labels are placed
    named = [row for row in rows if row.role != "merge" or row is table.best_mean] if near else rows
    for axes, shown in zip(panels, (named, merges), strict=False):
        _label(figure, axes, shown, table)
    return figure


def _at(rows: Sequence[Row], table: Standings) -> np.ndarray:
    return np.array([[100 * row.scores[task].value for task in table.tasks] for row in rows]).reshape(-1, 2)


def _crowded(merges: np.ndarray, everything: np.ndarray) -> list[list[float]] | None:
    """Corners of the region of the merges, if they fill less than half of the picture in both directions."""
    if len(merges) < 3:
        return None
    corners = np.array([merges.min(0) - 2, merges.max(0) + 2])
    return corners.tolist() if (np.ptp(corners, axis=0) < np.ptp(everything, axis=0) / 2).all() else None


def _scatter(axes: Axes, rows: Sequence[Row], table: Standings, looks: Mapping[str, dict[str, Any]]) -> None:
    for row in rows:
        x, y = (row.scores[task] for task in table.tasks)
        arms = {"xerr": _arms(x), "yerr": _arms(y), "elinewidth": 0.8, "ecolor": looks[row.model]["color"]}
        axes.errorbar(100 * x.value, 100 * y.value, **arms, fmt="none", alpha=0.55, zorder=2)
        axes.plot(100 * x.value, 100 * y.value, **looks[row.model], linestyle="none", zorder=4)
    axes.margins(0.09)
    axes.autoscale_view()
    axes.autoscale(False)
    for task, line in zip(table.tasks, (axes.axvline, axes.axhline), strict=True):
        if specialist := table.specialist(task):
            line(100 * specialist.scores[task].value, color=MUTED, linewidth=1.1, linestyle=DOTS, zorder=1)
    _front(axes, [row for row in table.rows if row.mean], table)


def task_means(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """Mean over the tasks with its interval, a row for each model; small grey marks are the single tasks."""
    table = standings(record)
    rows = [row for row in table.rows if row.mean]
    if not rows or len(table.tasks) == 2:
        return None
    figure = Figure(figsize=(7.8, 1.2 + 0.32 * len(rows)))
    axes, looks = figure.subplots(), _looks(table, record)
    for y, row in enumerate(rows):
        if len(table.tasks) > 1:
            single = [100 * row.scores[task].value for task in table.tasks]
            axes.plot(single, [y] * len(single), "|", color=MUTED, markersize=7, zorder=2)
        mean = row.mean or Interval(0.0)
        axes.errorbar(100 * mean.value, y, xerr=_arms(mean), fmt="none", ecolor=looks[row.model]["color"], zorder=3)
        axes.plot(100 * mean.value, y, **looks[row.model], linestyle="none", zorder=4)
    axes.set_yticks(range(len(rows)), [row.model for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row is table.best_mean else "normal")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"mean of {len(table.reported)} tasks, %" if len(table.tasks) > 1 else _axis(table, 0))
    figure.legend(handles=_legend(table), loc="outside lower center", ncols=3)
    return figure


def alignment(record: Mapping[str, Any], run_dir: Path) -> Figure | None:
    """KL of every teacher to the rotated model over the fit; large marks: on held-out problems, before and after."""
    align = record.get("align") or {}
    curve = align.get("curve") or []
    teachers = [key.removeprefix("kl_") for key in (curve[0] if curve else {}) if key.startswith("kl_")]
    if len(curve) < 2 or not teachers:
        return None
    colour = {**colours(teachers), **colours(experts(record))}
    figure = Figure(figsize=(7.8, 4.2))
    axes = figure.subplots()
    last = max(float(point["step"]) for point in curve)
    for teacher in teachers:
        points = [(float(p["step"]), number(p.get(f"kl_{teacher}"))) for p in curve]
        known = [(step, kl) for step, kl in points if kl is not None and kl > 0]
        axes.plot(
            [step for step, _ in known], [kl for _, kl in known], color=colour[teacher], linewidth=1.2, label=teacher
        )
        for key, step, face in (("kl_before", 0.0, PAPER), ("kl_after", last, colour[teacher])):
            kl = number((align.get(key) or {}).get(teacher))
            if kl is not None and kl > 0:
                mark = {"markersize": 8, "markerfacecolor": face, "zorder": 4, "clip_on": False}
                axes.plot(step, kl, "o", color=colour[teacher], **mark)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set(xlabel="step", ylabel="KL(teacher || rotated), nats per token")
    held = [("held out, before", PAPER), ("held out, after", INK)]
    marks = [
        Line2D([], [], color=INK, marker="o", linestyle="none", markerfacecolor=face, label=label)
        for label, face in held
    ]
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], *marks])
    return figure


def _looks(table: Standings, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Marker and colour of every model: experts as in the other figures, merges by kind, the best larger."""
    colour = colours(experts(record))
    looks: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        look: dict[str, Any] = {"marker": "o", "color": SKY, "markersize": 7}
        if row.role == "base":
            look |= {"marker": "s", "color": INK, "markersize": 8}
        elif row.role == "expert":
            look |= {"marker": "D", "color": colour.get(row.model, ORANGE), "markersize": 8}
        elif row.rotation:
            look |= {"color": PURPLE}
        if row.role == "merge" and row is table.best_mean:
            look |= {"marker": "*", "markersize": 15}
        elif row.role == "merge" and row is table.best_minimum:
            look |= {"marker": "^", "markersize": 10}
        looks[row.model] = look | {"markeredgecolor": PAPER, "markeredgewidth": 0.8}
    return looks


def _legend(table: Standings) -> list[Line2D]:
    merges = table.role("merge")
    entries: list[tuple[str, str, str, float, Any]] = [("base", "s", INK, 8, "none")] * bool(table.role("base"))
    entries += [("expert", "D", MUTED, 8, "none")] * bool(table.role("expert"))
    entries += [("merge", "o", SKY, 7, "none")] * any(not row.rotation for row in merges)
    entries += [("merge by rotation", "o", PURPLE, 7, "none")] * any(row.rotation for row in merges)
    both = table.best_mean is table.best_minimum and len(table.tasks) > 1
    best = f"chosen on {', '.join(table.select)}" if table.select else "best by mean" + " and minimum" * both
    entries += [(best, "*", MUTED, 14, "none")] * bool(merges)
    entries += [("best by minimum", "^", MUTED, 9, "none")] * (
        table.best_minimum is not None and not both and len(table.tasks) > 1
    )
    entries += [("95 % interval over problems", "", SKY, 0, "-")]
    if len(table.tasks) == 2:
        entries += [
            ("each expert on its own task", "", MUTED, 0, DOTS),
            ("no model is better on both", "", FRONT, 0, "-"),
        ]
    return [
        Line2D([], [], marker=marker, color=colour, markersize=size, linestyle=line, label=label)
        for label, marker, colour, size, line in entries
    ]


def _front(axes: Axes, rows: Sequence[Row], table: Standings) -> None:
    """Steps through the models that no other beats on both tasks."""
    points = [(float(x), float(y)) for x, y in _at(rows, table)]
    best = sorted(p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points))
    if len(best) > 1:
        axes.step([x for x, _ in best], [y for _, y in best], where="pre", color=FRONT, linewidth=0.9, zorder=1)


def _label(figure: Figure, axes: Axes, rows: Sequence[Row], table: Standings) -> None:
    """Names beside their points, clear of each other; a thin line where a name had to move away."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    weight = {row.model: "bold" if row.role != "merge" or row is table.best_mean else "normal" for row in rows}
    texts = [axes.text(0, 0, row.model, fontsize=9, fontweight=weight[row.model]) for row in rows]
    sizes = np.array([[t.get_window_extent(renderer).width, t.get_window_extent(renderer).height] for t in texts])
    arms = [_ends(row, table) for row in rows]
    pixels = axes.transData.transform(_at(rows, table))
    box = axes.get_window_extent(renderer)
    faint = axes.transData.transform(np.concatenate(arms))
    centres = place(pixels, sizes, (box.x0, box.y0, box.x1, box.y1), faint)
    for text, centre, size, point, row in zip(texts, centres, sizes, pixels, rows, strict=True):
        x, y = axes.transData.inverted().transform(centre)
        text.set(position=(x, y), ha="center", va="center", zorder=5, bbox=VEIL)
        near = np.clip(point, centre - size / 2, centre + size / 2)
        if np.linalg.norm(near - point) > 14:
            ends = axes.transData.inverted().transform([point, near])
            axes.plot(*ends.T, color=MUTED, linewidth=0.6, zorder=1.5, label=f"_{row.model}")


def _ends(row: Row, table: Standings) -> np.ndarray:
    """Points along the interval bars, which a label should rather not cover."""
    x, y = (row.scores[task] for task in table.tasks)
    t = np.linspace(0, 1, 9)
    across = [(100 * ((x.low or x.value) * (1 - s) + (x.high or x.value) * s), 100 * y.value) for s in t]
    up = [(100 * x.value, 100 * ((y.low or y.value) * (1 - s) + (y.high or y.value) * s)) for s in t]
    return np.array(across + up)


def _arms(interval: Interval) -> list[list[float]] | None:
    if interval.low is None or interval.high is None:
        return None
    return [[100 * max(interval.value - interval.low, 0.0)], [100 * max(interval.high - interval.value, 0.0)]]


def _axis(table: Standings, i: int) -> str:
    task = table.tasks[i]
    return f"{task}, {table.metrics[task]}, %"
