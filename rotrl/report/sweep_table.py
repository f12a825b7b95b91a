"""The terminal's view of a multirun: one table over its jobs."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from rotrl.report.curves import by_value, curves, in_words
from rotrl.report.notes import notes
from rotrl.report.protocols import protocol_rows
from rotrl.report.redact import redact
from rotrl.report.standings import Interval, standings
from rotrl.report.sweep import as_one_record
from rotrl.report.table import STYLE, fitting, merges_table, new_table, say, scores_table, signs
from rotrl.report.words import merge_words, percent, plus_minus, points, points_span


def sweep_table(records: list[dict[str, Any]], console: Console) -> None:
    """One table over all jobs of a multirun: by protocol, by the number that was swept, or the best merge first, each
    named by its label and what was swept."""
    records = redact(records)
    joined, failures = as_one_record(records)
    table = standings(joined)
    title = f"{len(records)} jobs"
    if compared := protocol_rows(records):
        console.print(_protocols(compared, console))
    elif swept := curves(records):
        console.print(_curves(swept, console))
        if swept["differences"]:
            console.print(_differences(swept, console))
    elif table.rows:
        console.print(scores_table(table, console, title, notes(joined)))
        say(console, {"merges": merge_words(table, joined)})
    elif joined["merges"]:
        console.print(merges_table(joined["merges"], console, title))
    say(console, {"failed": failures}, "red")


def _protocols(rows: list[dict[str, Any]], console: Console) -> Table:
    """A line for each model, task and protocol, those of a task beneath each other."""
    first = rows[0]["protocol"]
    view = new_table(
        "protocols", console, ["model", "task", "protocol"], ["n", "score, %", f"against {first}", "cut %"]
    )
    view.add_column("published", overflow="fold")
    previous = None
    for row in rows:
        if previous not in (None, (row["model"], row["task"])):
            view.add_section()
        previous = (row["model"], row["task"])
        score = plus_minus(Interval(row["value"], row["sampling_low"], row["sampling_high"]))
        change, against = row["difference"], ""
        if change is not None:
            interval = Interval(change, row["difference_low"], row["difference_high"])
            against = f"{points(interval)} {f'({points_span(interval)})' if interval.known else ''}"
        cut = percent(row["truncated"] / row["samples"]) if row["samples"] and row["truncated"] is not None else "–"
        cells = [row["model"], row["task"], row["protocol"], row["metric"].partition("@")[2], score, against, cut]
        view.add_row(*(signs(cell, console) for cell in [*cells, row["published"] or ""]))
    view.caption = signs("± and differences: 95 % of sampling, on these problems", console)
    return view


def _curves(swept: Mapping[str, Any], console: Console) -> Table:
    """A line for each model, a column for each value; one score where the weights are the same at every value."""
    view = new_table(str(swept["key"]), console, ["model"], ["at any", *map(in_words, swept["values"])])
    previous = None
    for (model, role), scores in by_value(swept["rows"], "model", "role").items():
        if previous not in (None, role):
            view.add_section()
        previous = role
        cells = [plus_minus(scores[value]) if value in scores else "" for value in ("", *swept["values"])]
        view.add_row(*(signs(cell, console) for cell in (model, *cells)), style=STYLE[role])
    seeds = max(row["jobs"] for row in swept["rows"])
    averaged = f"; means over {seeds} seeds" if seeds > 1 else ""
    told = f"mean over tasks in percent, 95 % interval over problems{averaged}; {swept['tried']} merges were tried on "
    view.caption = signs(told + "these problems, so the best score is optimistic", console)
    return view


def _differences(swept: Mapping[str, Any], console: Console) -> Table:
    """A line for each pair; with whole intervals where they fit the terminal, else with their larger half."""
    views = [_difference_table(swept, console, show) for show in (lambda d: f"{points(d)} ({points_span(d)})", within)]
    return fitting(views, console)


def _difference_table(swept: Mapping[str, Any], console: Console, show: Callable[[Interval], str]) -> Table:
    view = new_table("learned rotations against", console, ["merge"], [in_words(value) for value in swept["values"]])
    several = len({row["a"] for row in swept["differences"]}) > 1
    for (a, b), found in by_value(swept["differences"], "a", "b").items():
        cells = [show(found[value]) if value in found else "" for value in swept["values"]]
        view.add_row(*(signs(cell, console) for cell in (f"{a} − {b}" if several else b, *cells)))
    view.caption = signs("points, paired by problem, 95 % interval: a null result where it includes 0", console)
    return view


def within(difference: Interval) -> str:
    """`−2.4 ±1.3`: points and the larger half of the interval."""
    if difference.low is None or difference.high is None:
        return points(difference)
    half = max(difference.high - difference.value, difference.value - difference.low)
    return f"{points(difference)} ±{percent(half)}"
