"""Published scores of known models, and the windows that they were trained on: what a score can be held against."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
    return name.casefold() in re.split(r"[/\\@]|--", model.casefold())


@cache
def _published() -> dict[str, Any]:
    import yaml

    return yaml.safe_load(files("rotrl.evaluate").joinpath("anchors.yaml").read_text(encoding="utf-8"))
