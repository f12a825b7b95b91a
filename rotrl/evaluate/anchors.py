"""Published scores of known models, and the windows that they were trained on: what a score can be held against."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

Window = tuple[str | None, str | None]


@dataclass(frozen=True)
class Anchor:
    """A published score from `low` to `high` (fractions). `differs` says where the protocol at hand isn't that of
    the publication: only without it the two may be compared."""

    model: str
    task: str
    low: float
    high: float
    source: str
    differs: str = ""

    def place(self, low: float, high: float) -> str:
        """Words for a score whose interval is [low, high]."""
        band = f"{100 * self.low:g}" if self.low == self.high else f"{100 * self.low:g} to {100 * self.high:g}"
        if self.differs:
            return f"published {band}, not comparable: {self.differs}"
        if high < self.low:
            return f"below the published {band}"
        if low > self.high:
            return f"above the published {band}"
        return f"within the published {band}"


def anchors(
    model: str, task: str, protocol: Mapping[str, Any] | None = None, window: Window | None = None
) -> list[Anchor]:
    """Published scores of a model on a task, comparable ones first.

    `model` is a hub id or a path that has its last part in it; `protocol` the settings of this run (temperature,
    top_p, max_tokens), None to see all; `window` the [start, end) of a dated task.
    """
    data = _published()
    found = [
        Anchor(
            entry["model"],
            task,
            round(entry["band"][0] / 100, 5),
            round(entry["band"][1] / 100, 5),
            entry.get("source", "several publications"),
            "" if protocol is None else _differs(entry.get("settings", data["settings"]), protocol),
        )
        for entry in data["scores"]
        if entry["task"] == task and _is(model, entry["model"]) and _window(entry) in (window, None)
    ]
    return sorted(found, key=lambda anchor: bool(anchor.differs))


def published_merges(experts: Collection[str], task: str) -> dict[str, float]:
    """{method: score as a fraction} of published merges of exactly these experts."""
    return {
        method: scores[task] / 100
        for entry in _published()["merges"]
        if len(entry["experts"]) == len(experts) and all(any(_is(e, k) for e in experts) for k in entry["experts"])
        for method, scores in entry["scores"].items()
        if task in scores
    }


def beside(
    scores: Sequence[Mapping[str, Any]],
    ids: Mapping[str, str],
    merges: Collection[str],
    tasks: Mapping[str, Any],
    protocol: Mapping[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """What the scores of known models stand beside: {published: bands, contaminated: training windows}, by model, task.

    `ids` names base and experts by hub id or folder; a merge inherits the training of all of them. `tasks` is that of
    the configuration, for windows and the size of a whole set. A score is placed by its sampling interval.
    """
    found: dict[str, list[dict[str, Any]]] = {"published": [], "contaminated": []}
    for row in scores:
        model, task = str(row["model"]), str(row["task"])
        if not str(row["metric"]).startswith("avg@") or not (model in ids or model in merges):
            continue
        node = tasks.get(task) or {}
        window = (node.get("start"), node.get("end")) if "start" in node else None
        about = {"model": model, "task": task}
        parents = list(ids.values()) if model in merges else [ids[model]]
        found["contaminated"] += [about | {"words": words} for words in contamination(parents, task, window)]
        known = anchors(ids[model], task, protocol, window)[:1] if model in ids else _merge_anchor(model, ids, task)
        for anchor in known:
            reasons = [anchor.differs, *_too_little(row, node)]
            anchor = replace(anchor, differs=", ".join(reason for reason in reasons if reason))
            bounds = float(row["sampling_low"] or 0.0), float(row["sampling_high"] or 1.0)
            place = {"low": anchor.low, "high": anchor.high, "comparable": not anchor.differs, "source": anchor.source}
            found["published"].append(about | place | {"words": anchor.place(*bounds)})
    return found


def _merge_anchor(label: str, ids: Mapping[str, str], task: str) -> list[Anchor]:
    score = published_merges([model for name, model in ids.items() if name != "base"], task).get(label)
    unknown = "its sampling settings are not known"
    return [] if score is None else [Anchor(label, task, score, score, "arXiv 2607.19331", unknown)]


def _too_little(row: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[str]:
    least = _published()["least"]
    n, wanted = int(str(row["metric"]).partition("@")[2]), least.get(row["task"], least["default"])
    if n < wanted:
        yield f"n {n} where {wanted} are needed"
    if row["problems"] < (node.get("problems") or 0):
        yield f"{row['problems']} of {node['problems']} problems"


def contamination(models: Collection[str], task: str, window: Window | None = None) -> list[str]:
    """One sentence for each model that was trained on problems of this task's window; for a merge give its parents."""
    start, end = window or (None, None)
    return [
        f"{entry['model']} was trained on {task} from {entry['start']} to before {entry['end']} ({entry['source']})"
        for entry in _published()["trained_on"]
        if entry["task"] == task
        and any(_is(model, entry["model"]) for model in models)
        and (end is None or entry["start"] < end)
        and (start is None or start < entry["end"])
    ]


def _differs(settings: Mapping[str, float] | None, protocol: Mapping[str, Any]) -> str:
    if settings is None:
        return "its sampling settings are not known"
    return ", ".join(
        f"{key} {protocol[key]:g} where {value:g} was published"
        for key, value in settings.items()
        if key in protocol and (protocol[key] < value if key == "max_tokens" else protocol[key] != value)
    )


def _window(entry: Mapping[str, Any]) -> Window | None:
    return (entry["start"], entry["end"]) if "start" in entry else None


def _is(model: str, name: str) -> bool:
    """`ORG/NAME`, `ORG/NAME@COMMIT`, `DIR/NAME` and the hub's cache `models--ORG--NAME/snapshots/COMMIT`."""
    parts = re.split(r"[/\\]", model.partition("@")[0].rstrip("/\\"))
    cached = parts.index("snapshots") if "snapshots" in parts[1:-1] else 0
    last = parts[cached - 1].rpartition("--")[2] if cached else parts[-1]
    return name.casefold() == last.casefold()


@cache
def _published() -> dict[str, Any]:
    import yaml

    return yaml.safe_load(files("rotrl.evaluate").joinpath("anchors.yaml").read_text(encoding="utf-8"))
