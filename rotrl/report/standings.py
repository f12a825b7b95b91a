"""Who stands where: the scores of a record as rows that the table, the page and the figures share.

All values are fractions; the views print percent. An interval is the 95 % one over problems, unless it says sampling.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

OVERALL = ("mean", "all", "average", "overall")  # a task of these names is the mean over the tasks


@dataclass(frozen=True)
class Interval:
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        return self.low is not None and self.high is not None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __neg__(self) -> "Interval":
        return Interval(-self.value, _negative(self.high), _negative(self.low))


@dataclass(frozen=True)
class Row:
    """One model. `mean` and `minimum` are over the reported tasks and absent while one is missing."""

    model: str
    role: str  # base, expert or merge
    scores: dict[str, Interval] = field(default_factory=dict)
    sampling: dict[str, Interval] = field(default_factory=dict)
    mean: Interval | None = None
    minimum: float | None = None
    selection: float | None = None  # mean over the tasks that select, where some do
    retention: dict[str, Interval] = field(default_factory=dict)  # per task, of the expert that is best at it
    versus: Interval | None = None  # paired difference of the mean to the best single expert's
    rotation: bool = False  # a merge that applies rotations


@dataclass(frozen=True)
class Standings:
    """Rows: base, experts, merges by falling mean. `select` are the tasks by which the best merge is chosen;
    the others report: means and differences are theirs alone."""

    tasks: tuple[str, ...]
    metrics: dict[str, str]  # task: "avg@8"
    rows: tuple[Row, ...]
    select: tuple[str, ...] = ()

    @property
    def reported(self) -> tuple[str, ...]:
        return tuple(task for task in self.tasks if task not in self.select)

    def role(self, role: str) -> list[Row]:
        return [row for row in self.rows if row.role == role]

    def row(self, model: str | None) -> Row | None:
        return next((row for row in self.rows if row.model == model), None)

    @property
    def best_mean(self) -> Row | None:
        if self.select:
            return _best(self.role("merge"), lambda row: row.selection)
        return _best(self.role("merge"), lambda row: row.mean.value if row.mean else None)

    @property
    def best_minimum(self) -> Row | None:
        """None where the choice is made on tasks of its own."""
        return None if self.select else _best(self.role("merge"), lambda row: row.minimum)

    @property
    def best_expert(self) -> Row | None:
        return _best(self.role("expert"), lambda row: row.mean.value if row.mean else None)

    @property
    def ceiling(self) -> float | None:
        """The mean over tasks of the best expert on each: what one model with both skills would have."""
        best = [self.specialist(task) for task in self.reported]
        values = [row.scores[task].value for row, task in zip(best, self.reported, strict=True) if row]
        return sum(values) / len(values) if values and len(values) == len(self.reported) else None

    def specialist(self, task: str) -> Row | None:
        return _best(self.role("expert"), lambda row: row.scores[task].value if task in row.scores else None)


def standings(record: Mapping[str, Any]) -> Standings:
    """The rows of a record; models without scores are left out."""
    cells: dict[str, dict[str, Interval]] = {}
    sampling: dict[str, dict[str, Interval]] = {}
    metrics: dict[str, str] = {}
    overall: dict[str, Interval] = {}
    for score in record.get("scores") or []:
        metric, value = str(score.get("metric", "")), number(score.get("value"))
        if not metric.startswith("avg@") or value is None:
            continue
        model, task = str(score["model"]), str(score["task"])
        cell = Interval(value, number(score.get("low")), number(score.get("high")))
        if task in OVERALL:
            overall[model] = cell
            continue
        metrics.setdefault(task, metric)
        cells.setdefault(model, {}).setdefault(task, cell)
        low, high = number(score.get("sampling_low")), number(score.get("sampling_high"))
        sampling.setdefault(model, {}).setdefault(task, Interval(value, low, high))
    tasks = tuple(metrics)
    chosen = ((record.get("config") or {}).get("evaluation") or {}).get("select") or ()
    table = Standings(tasks, metrics, (), tuple(task for task in chosen if task in tasks))
    rows = []
    for model, scores in cells.items():
        mean, minimum = _over_tasks(scores, table.reported, overall.get(model))
        selection, _ = _over_tasks(scores, table.select, None) if table.select else (None, None)
        role, drawn = role_of(model, record), selection.value if selection else None
        rows.append(Row(model, role, scores, sampling[model], mean, minimum, drawn))
    return _compared(replace(table, rows=tuple(_sorted(rows, record))), record)


def role_of(model: str, record: Mapping[str, Any]) -> str:
    if model == "base":
        return "base"
    return "expert" if model in experts(record) else "merge"


def experts(record: Mapping[str, Any]) -> list[str]:
    return list((record.get("models") or {}).get("experts") or {})


def rotates(merge: str, record: Mapping[str, Any]) -> bool:
    """Whether a merge turns weights. One that applies what was learned does so only if that is a rotation."""
    applied = ((record.get("merges") or {}).get(merge) or {}).get("rotates", True)
    return bool(applied) and "rotation" in method_target(merge, record)


def method_target(label: str, record: Mapping[str, Any]) -> str:
    """`_target_` of a merge, from its entry in the record or from the configuration of the run."""
    entry = (record.get("merges") or {}).get(label) or {}
    suite = (record.get("config") or {}).get("merge") or {}
    for config in (entry.get("config"), entry.get("method"), suite.get(label), suite):
        if isinstance(config, Mapping) and "_target_" in config:
            return str(config["_target_"])
    return ""


def paired(a: str, b: str, record: Mapping[str, Any], tasks: Iterable[str]) -> Interval | None:
    """Paired difference `a - b` of the mean over tasks; None where the record has no such comparison.

    Without a row for the mean the tasks' differences are averaged and their half-widths added in quadrature: tasks are
    independent sets of problems.
    """
    found: dict[str, Interval] = {}
    for row in record.get("comparisons") or []:
        value = number(row.get("difference"))
        if value is None or {row.get("a"), row.get("b")} != {a, b}:
            continue
        difference = Interval(value, number(row.get("low")), number(row.get("high")))
        found.setdefault(str(row.get("task")), difference if row.get("a") == a else -difference)
    for name in OVERALL:
        if name in found:
            return found[name]
    tasks = tuple(tasks)
    return average([found[task] for task in tasks]) if tasks and all(task in found for task in tasks) else None


def average(intervals: list[Interval]) -> Interval:
    """Mean of independent estimates."""
    return total(intervals, 1 / len(intervals))


def total(intervals: list[Interval], weight: float = 1.0) -> Interval:
    """`weight * sum` of independent estimates: half-widths are added in quadrature."""
    value = weight * sum(i.value for i in intervals)
    if not all(i.known for i in intervals):
        return Interval(value)
    down = weight * math.sqrt(sum((i.value - (i.low or 0.0)) ** 2 for i in intervals))
    up = weight * math.sqrt(sum(((i.high or 0.0) - i.value) ** 2 for i in intervals))
    return Interval(value, value - down, value + up)


def number(value: Any) -> float | None:
    """A finite float out of a CSV or JSON cell."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def _over_tasks(scores: dict[str, Interval], tasks: tuple[str, ...], overall: Interval | None):
    if any(task not in scores for task in tasks):
        return None, None
    cells = [scores[task] for task in tasks]
    return overall or average(cells), min(cell.value for cell in cells)


def _sorted(rows: list[Row], record: Mapping[str, Any]) -> list[Row]:
    order = {name: i for i, name in enumerate(["base", *experts(record)])}

    def key(row: Row) -> tuple[float, float]:
        mean = row.mean.value if row.mean else -math.inf
        return order.get(row.model, len(order)), -mean

    return sorted(rows, key=key)


def _compared(table: Standings, record: Mapping[str, Any]) -> Standings:
    best = table.best_expert
    rows = []
    for row in table.rows:
        kept = {}
        for task in table.tasks:
            specialist = table.specialist(task)
            if row.role == "merge" and specialist and (found := _retention(row.model, specialist.model, task, record)):
                kept[task] = found
        versus = paired(row.model, best.model, record, table.reported) if best and row.role == "merge" else None
        rotation = row.role == "merge" and rotates(row.model, record)
        rows.append(replace(row, retention=kept, versus=versus, rotation=rotation))
    return replace(table, rows=tuple(rows))


def _retention(merge: str, expert: str, task: str, record: Mapping[str, Any]) -> Interval | None:
    for row in record.get("comparisons") or []:
        if (row.get("a"), row.get("b"), row.get("task")) == (merge, expert, task):
            value = number(row.get("retention"))
            if value is not None:
                return Interval(value, number(row.get("retention_low")), number(row.get("retention_high")))
    return None


def _best(rows: list[Row], key: Any) -> Row | None:
    scored = [(key(row), row) for row in rows if key(row) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
