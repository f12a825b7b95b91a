"""One page of a run: report.html, self-contained, readable on a phone, in the dark and on paper."""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rotrl.checkpoint.files import whole_file
from rotrl.report import alignment, words
from rotrl.report.curves import by_value, in_words
from rotrl.report.notes import notes
from rotrl.report.paint import BLUE, INK, MUTED, PAPER, RULE
from rotrl.report.redact import redact
from rotrl.report.standings import Interval, Standings, number, paired, standings

FIGURES = {
    "tasks_scatter": "Both tasks at once. Where the dotted lines meet, one model would be as good as both experts.",
    "task_means": "Mean over the tasks with its interval; small grey marks are the single tasks.",
    "share_vs_null": "Share of each update that a one-sided rotation explains, against what the same update with "
    "random signs would show. Rotations lie far above the diagonal, as the planted ones do; on it is the null.",
    "kappa_by_layer": "kappa = (share - null) / (1 - null), a mark for each matrix. The band and the dashed line are "
    "the thresholds that were fixed beforehand; bars are 1.96 standard deviations of the null.",
    "calibration": "What a kappa means: that of the update with random signs once a known share of rotation is planted "
    "in it. Dashed: the medians of the updates themselves; read their share off the line.",
    "angle_spectra": "Angle by which the best rotation turns the singular directions, from the largest singular values "
    "on, medians over layers of each tenth. Dashed: isotropic noise of the same norm, about sigma/s in every plane.",
    "parts": "Share of the KL to the expert that a part of its update closes, against its share of the energy. Filled: "
    "parts; hollow: controls; dashed: the whole update at a scale. What is level with its control shows nothing.",
    "dose_response": "The same along the update and along its rotation; at t = 1 the update is the expert's matrices.",
    "restored": "What is left of the skill with the base's singular vectors put back into these ranks or layers, "
    "beside as much energy taken out of the update at random.",
    "curves": "Mean over the tasks at each value of what was swept, with its interval over problems; the bands are the "
    "extremes over seeds. Dashed: the best merge that it does not change, and each expert on its own task.",
    "alignment": "Divergence of the rotated model from its teachers while the rotations were learned. Lines: training "
    "batches; circles: held-out problems, before (open) and after (filled).",
    "alignment_by_layer": "What was learned of each matrix: how far its rotation turns, and how much of the squared "
    "distance to its counterpart in the teachers that removes. Hollow: outputs turned; filled: inputs.",
}
# Colours of the figures that follow the page into the dark.
THEMED = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", BLUE.lower(): "blue"}


def render(record: Mapping[str, Any], run_dir: Path) -> Path:
    """Writes run_dir/report.html from the record and the SVGs of run_dir/figures (`figures.draw` makes them)."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "percent": lambda value, digits=1: words.percent(number(value), digits),
        "span": words.span,
        "points": words.points,
        "points_span": words.points_span,
        "signed_points": lambda value: words.signed(100 * value),
        "digits": _digits,
        "short": lambda text: str(text or "")[:12],
    }
    page = environment.get_template("report.html.j2").render(view(redact(record), Path(run_dir)))
    path = Path(run_dir) / "report.html"
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def view(record: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    table = standings(record)
    return {
        "record": {key: record.get(key) or "" for key in ("name", "status", "error", "command", "digest", "rotrl")},
        "when": _when(record),
        "models": _models(record),
        "consequences": words.consequences(record),
        "verdicts": {
            "Lineage": words.lineage_words(record)[:1],
            "Geometry": words.geometry_words(record),
            "Function": words.function_words(record),
            "Alignment": alignment.sentences(record.get("align") or {}),
            "Merges": words.merge_words(table, record),
        },
        "table": table,
        "scale": _scale(table),
        "against": _against(table, record),
        "notes": notes(record),
        "protocols": record.get("protocols") or [],
        "jobs": record.get("jobs") or [],
        "curves": _curves(record.get("curves") or {}),
        "scores": record.get("scores") or [],
        "comparisons": record.get("comparisons") or [],
        "figures": _figures(run_dir),
        "geometry": (record.get("geometry") or {}).get("rows") or [],
        "beside": {key: (record.get("geometry") or {}).get(key) or [] for key in ("bands", "suite", "pairs")},
        "function": (record.get("function") or {}).get("rows") or [],
        "decided": ((record.get("function") or {}).get("thresholds") or {}).get("words"),
        "thresholds": ((record.get("geometry") or {}).get("thresholds") or {}).get("words"),
        "align": _align(record.get("align") or {}),
        "aligned": alignment.by_module(alignment.matrices(run_dir)),
        "merges": record.get("merges") or {},
        "warnings": record.get("warnings") or [],
        "decisions": record.get("decisions") or [],
        "stages": record.get("stages") or {},
        "provenance": _provenance(record),
        "config": json.dumps(record.get("config"), indent=2, ensure_ascii=False),
    }


def _curves(found: Mapping[str, Any]) -> dict[str, Any]:
    if not found:
        return {}
    scores = by_value(found["rows"], "model", "role")
    return {**found, "in_words": in_words, "scores": scores, "pairs": by_value(found["differences"], "a", "b")}


def _when(record: Mapping[str, Any]) -> str:
    begin, end = record.get("created"), record.get("finished")
    try:
        seconds = (datetime.fromisoformat(str(end)) - datetime.fromisoformat(str(begin))).total_seconds()
    except ValueError:
        return str(begin or "")
    return f"{begin}, took {_duration(seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _models(record: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    models = record.get("models") or {}
    found = [("base", "base", models["base"])] if models.get("base") else []
    for group, role in (("experts", "expert"), ("controls", "control"), ("others", "of another base")):
        found += [(name, role, model) for name, model in (models.get(group) or {}).items()]
    return found


class _Scale:
    """Where a score lies, in percent of the strip's width."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, max(high, low + 0.01)

    def __call__(self, value: float | None) -> float:
        return round(100 * ((self.low if value is None else value) - self.low) / (self.high - self.low), 2)

    def width(self, interval: Interval) -> float:
        return round(self(interval.high) - self(interval.low), 2) if interval.known else 0.0


def _scale(table: Standings) -> _Scale:
    """The strips' axis: whole tens around all means and their intervals."""
    means = [row.mean for row in table.rows if row.mean]
    ends = [end for mean in means for end in (mean.low, mean.value, mean.high) if end is not None]
    if not ends:
        return _Scale(0.0, 1.0)
    return _Scale(int(10 * min(ends)) / 10, min(1.0, int(10 * max(ends) + 1) / 10))


def _against(table: Standings, record: Mapping[str, Any]) -> dict[str, Any]:
    """Paired difference of the mean over tasks: a row for each merge, a column for the base and every expert."""
    others = [row.model for row in table.rows if row.role != "merge"]
    rows = {m.model: [paired(m.model, other, record, table.reported) for other in others] for m in table.role("merge")}
    return {"others": others, "rows": rows if any(any(cells) for cells in rows.values()) else {}}


def _figures(run_dir: Path) -> list[tuple[str, str, Markup]]:
    found = [(name, caption, run_dir / "figures" / f"{name}.svg") for name, caption in FIGURES.items()]
    return [(name, caption, _inline(path, name)) for name, caption, path in found if path.is_file()]


def _inline(path: Path, name: str) -> Markup:
    """An SVG file as part of the page: ids of its own, colours of the page, no namespaces or metadata."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(?<=<svg) (?:width|height)="[^"]*"|(?<=pt") (?:width|height)="[^"]*"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in THEMED.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)


def _align(align: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not align:
        return []
    source = align.get("source")
    if isinstance(source, Mapping):
        kind, what = next(iter(source.items()), ("", ""))
        merge = what.get("_target_", "").rsplit(".", 1)[-1] if isinstance(what, Mapping) else what
        source = f"{kind} {merge}"
    before, after = align.get("kl_before") or {}, align.get("kl_after") or {}
    rows = [
        ("source", source),
        ("teachers", ", ".join(align.get("teachers") or [])),
        ("objective", ", ".join(str(align[key]) for key in ("objective", "parametrization") if align.get(key))),
        *(
            (f"KL from {name}, nats per token", f"{_digits(before.get(name), 4)} before, {_digits(kl, 4)} after")
            for name, kl in after.items()
        ),
        ("angles", _angles(align)),
        ("way to the mean teacher's weights", _way(align)),
        ("orthogonality error", _digits(align.get("orthogonality_error"), 7) if _angles(align) else ""),
        *((f"control {label}", _control(control)) for label, control in (align.get("controls") or {}).items()),
        ("time", _duration(number(align.get("seconds")) or 0.0)),
    ]
    return [(label, str(value)) for label, value in rows if value]


def _angles(align: Mapping[str, Any]) -> str:
    """Empty where what was learned is no rotation."""
    if number(align.get("angle_rms")) is None:
        return ""
    return f"{_digits(align['angle_rms'], 2)}° rms, {_digits(align.get('angle_max'), 2)}° largest"


def _control(align: Mapping[str, Any]) -> str:
    """What the same fit reached by another family."""
    after = ", ".join(f"{name} {_digits(kl, 4)}" for name, kl in (align.get("kl_after") or {}).items())
    return f"{align.get('parametrization')}; KL after: {after}"


def _way(align: Mapping[str, Any]) -> str:
    learned, closed = number(align.get("explained")), number(align.get("closed_form"))
    if learned is None:
        return ""
    nearest = f"; closed form (Procrustes): {words.percent(closed)} %" if closed is not None else ""
    return f"{words.percent(learned)} % of the squared distance removed{nearest}"


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    device = record.get("device")
    if isinstance(device, Mapping):
        device = ", ".join(f"{key} {_listed(value)}" for key, value in device.items() if value not in (None, [], ""))
    rows = [
        ("rotrl", record.get("rotrl")),
        *(record.get("versions") or {}).items(),
        ("device", device),
        ("sandbox for model-written code", record.get("sandbox_level")),
        ("prompts (sha256)", record.get("prompt_sha256")),
        ("run (digest)", record.get("digest")),
    ]
    return [(str(label), str(value)) for label, value in rows if value]


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _digits(value: Any, digits: int = 3) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.{digits}f}".replace("-", "−")
