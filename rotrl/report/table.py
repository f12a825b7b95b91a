"""The terminal's view of a record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rotrl.report.notes import Note, Notes, note_words, notes
from rotrl.report.redact import redact
from rotrl.report.standings import Interval, Row, Standings, number, standings
from rotrl.report.words import (
    function_words,
    geometry_words,
    lineage_words,
    merge_words,
    percent,
    plus_minus,
    points,
    points_span,
    signed,
    span,
)

ASCII = str.maketrans({"★": "*", "◆": "#", "±": "+/-", "−": "-", "–": "-", "†": "+"})
STYLE = {"base": "dim", "expert": "cyan", "merge": ""}


def _with_span(interval: Interval) -> str:
    return f"{percent(interval.value)} ({span(interval)})" if interval.known else percent(interval.value)


# How a score and a difference are written, widest first; the first that fits the terminal is taken.
FORMATS: tuple[tuple[Callable[[Interval], str], bool], ...] = (
    (_with_span, True),
    (plus_minus, False),
    (lambda interval: percent(interval.value), False),
)


def show(record: Mapping[str, Any], console: Console) -> None:
    """Prints what the record holds: evidence in words, scores or merges as a table, the verdict, warnings."""
    record = redact(record)
    table = standings(record)
    if record.get("status") not in (None, "done"):
        say(console, {str(record["status"]): [str(record.get("error") or "the run has not ended")]}, "red")
    told = {"lineage": lineage_words(record), "geometry": geometry_words(record), "function": function_words(record)}
    say(console, told)
    if table.rows:
        console.print(scores_table(table, console, "scores", notes(record)))
        say(console, {"merges": merge_words(table, record)})
    else:
        if record.get("geometry"):
            console.print(_geometry(record["geometry"], console))
        if record.get("merges"):
            console.print(merges_table(record["merges"], console, "merges"))
    beside = note_words(record)
    say(console, {key: beside[key] for key in ("cut off", "published")})
    say(console, {"contaminated": beside["contaminated"], "warnings": record.get("warnings") or []}, "yellow")


def legend(table: Standings) -> str:
    best = f"★ chosen on {', '.join(table.select)}" if table.select else "★ best merge by mean, ◆ by minimum"
    marks = f"; {best}" if table.role("merge") else ""
    kept = "; kept: of the expert's gain over the base" if any(row.retention for row in table.rows) else ""
    return f"avg@n in percent, 95 % interval over problems{kept}{marks}"


def scores_table(table: Standings, console: Console, title: str, beside: Notes) -> Table:
    return fitting([_score_table(table, console, title, beside, *chosen) for chosen in FORMATS], console)


def fitting(views: Sequence[Table], console: Console) -> Table:
    """The first that is no wider than the console, or else the last."""
    unbounded = console.options.update(width=10_000)
    narrow = (view for view in views if console.measure(view, options=unbounded).maximum <= console.width)
    return next(narrow, views[-1])


def _score_table(
    table: Standings, console: Console, title: str, beside: Notes, show: Callable[[Interval], str], spans: bool
) -> Table:
    several = len(table.reported) > 1
    kept = any(row.retention for row in table.rows)
    against = table.best_expert if any(row.versus for row in table.rows) else None
    heads = [f"{task}\n{table.metrics[task]}" for task in table.tasks] + ["mean", "min"] * several
    heads += ["kept\n%"] * kept + [f"against\n{against.model}" if against else ""] * bool(against)
    counted = spans and any(note.tokens is not None for note in beside.values())
    heads += ["tokens", "cut\n%"] * counted
    view = new_table(title, console, ["model"], heads)
    view.columns[0].no_wrap = True
    trained = "; † trained on these problems" * any(note.contaminated for note in beside.values())
    view.caption = signs(legend(table) + trained, console)
    previous = None
    for row in table.rows:
        if previous not in (None, row.role):
            view.add_section()
        previous = row.role
        scores = [row.scores.get(task) for task in table.tasks] + [row.mean] * several
        cells = [row.model + _mark(row, table), *(show(cell) if cell else "–" for cell in scores)]
        for i, task in enumerate(table.tasks, start=1):
            cells[i] += "†" * bool(beside.get((row.model, task), Note()).contaminated)
        cells += [percent(row.minimum)] * several
        cells += ["/".join(_kept(row, task) for task in table.tasks) if row.role == "merge" else ""] * kept
        difference = f"{points(row.versus)} ({points_span(row.versus)})" if spans and row.versus else points(row.versus)
        cells += [difference if row.role == "merge" else ""] * bool(against)
        own = [beside[row.model, task] for task in table.tasks if (row.model, task) in beside]
        cells += ["/".join(_count(n.tokens) for n in own), "/".join(percent(n.truncated) for n in own)] * counted
        marked = row is table.best_mean or row is table.best_minimum
        view.add_row(*(signs(cell, console) for cell in cells), style="bold green" if marked else STYLE[row.role])
    return view


def _mark(row: Row, table: Standings) -> str:
    marks = "★" * (row is table.best_mean) + "◆" * (row is table.best_minimum and len(table.tasks) > 1)
    return f" {marks}" if marks else ""


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _kept(row: Row, task: str) -> str:
    return percent(row.retention[task].value, 0) if task in row.retention else "–"


def _geometry(geometry: Mapping[str, Any], console: Console) -> Table:
    """Share of the update that a rotation explains, its null in brackets, and kappa; medians over layers.

    Where there is no room, of the models that serve as references kappa alone; then of all.
    """
    names = list(dict.fromkeys(str(row["expert"]) for row in geometry.get("rows") or []))
    experts = [name for name in names if name not in (geometry.get("references") or [])]
    return fitting([_geometry_table(geometry, console, names, whole) for whole in (names, experts, [])], console)


def _geometry_table(geometry: Mapping[str, Any], console: Console, names: Sequence[str], whole: Sequence[str]) -> Table:
    cells: dict[str, dict[str, str]] = {}
    for row in geometry.get("rows") or []:
        share, null = (percent(number(row.get(key))) for key in ("share_median", "null_median"))
        beside = f"{share} ({null}) " if row["expert"] in whole else ""
        text = beside + signed(number(row.get("kappa_median")), 2)
        cells.setdefault(f"{row['module']} {row['side']}", {})[str(row["expert"])] = text
    view = new_table("geometry", console, ["matrix"], list(names))
    view.columns[0].no_wrap = True
    view.caption = "share of the update in %, (its null), kappa; medians over layers" if whole else "median kappa"
    for matrix, by_expert in cells.items():
        line = [matrix, *(by_expert.get(name, "–") for name in names)]
        view.add_row(*(signs(cell, console) for cell in line))
    return view


def merges_table(merges: Mapping[str, Mapping[str, Any]], console: Console, title: str) -> Table:
    view = new_table(title, console, ["merge"], ["coefficient", "norm ratio", "loss", "dtype"])
    view.add_column("folder", overflow="fold")
    for label, made in merges.items():
        numbers = [(number(made.get(key))) for key in ("effective_coefficient", "norm_ratio", "storage_loss")]
        shown = ["–" if value is None else f"{value:.3g}" for value in numbers]
        cells = [label, *shown, str(made.get("dtype", "–")), str(made.get("path", "–"))]
        view.add_row(*(signs(cell, console) for cell in cells))
    view.caption = (
        "coefficient: effective, per expert   norm ratio: merged to mean expert   loss: of the update, by storage"
    )
    view.caption_justify, view.caption_style = "left", "dim"
    return view


def new_table(title: str, console: Console, texts: list[str], numbers: list[str]) -> Table:
    shape = box.ASCII if console.options.ascii_only else box.SIMPLE_HEAD
    view = Table(
        title=title, title_justify="left", title_style="bold", box=shape, padding=(0, 1, 0, 0), show_edge=False
    )
    overflow = "crop" if console.options.ascii_only else "ellipsis"
    for text in texts:
        view.add_column(text, overflow=overflow)
    for text in numbers:
        view.add_column(signs(text, console), justify="right", no_wrap=True, overflow=overflow)
    return view


def markdown(view: Table) -> str:
    """The table as Markdown, every head on one line."""
    heads = [_escaped(column.header) for column in view.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in view.columns]
    rows = zip(*([_escaped(cell) for cell in column.cells] for column in view.columns), strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rules, *rows))


def _escaped(cell: RenderableType) -> str:
    return str(cell).replace("\n", " ").replace("|", "\\|")


def signs(text: str, console: Console) -> Text:
    return Text(text.translate(ASCII) if console.options.ascii_only else text)


def say(console: Console, paragraphs: Mapping[str, list[str]], style: str = "") -> None:
    """Sentences beside their title, wrapped under themselves."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(style=style)
    for title, sentences in paragraphs.items():
        for i, sentence in enumerate(sentence for sentence in sentences if sentence):
            grid.add_row(Text(title if i == 0 else ""), signs(sentence, console))
    if grid.row_count:
        console.print(grid)
