"""Models under several protocols, side by side: what a harness alone does to a score."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotrl.report.standings import OVERALL, Interval, number, total

COLUMNS = (
    "model",
    "task",
    "protocol",
    "metric",
    "value",
    "low",
    "high",
    "sampling_low",
    "sampling_high",
    "difference",
    "difference_low",
    "difference_high",
    "samples",
    "truncated",
    "tokens",
    "published",
)


def labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The protocol of each job by its name, and by the settings that differ where a name stands for several."""
    settings = [(record.get("config") or {}).get("protocol") or {} for record in records]
    found = []
    for own in settings:
        others = [other for other in settings if other.get("name") == own.get("name") and other != own]
        keys = [key for key in own if any(other.get(key) != own[key] for other in others)]
        found.append(" ".join([str(own.get("name")), *(f"{key}={own[key]}" for key in keys)]))
    return found


def protocol_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """avg@n of each model and task under each protocol, in the order of the jobs; nothing where all jobs share one.

    `difference` is to the first protocol, on the same problems: its interval is that of sampling in both.
    """
    named = labels(records)
    if len(set(named)) < 2:
        return []
    first: dict[tuple[str, str], Interval] = {}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for label, record in zip(named, records, strict=True):
        bands = {(row["model"], row["task"]): row["words"] for row in record.get("published") or []}
        for row in record.get("scores") or []:
            place, value = (str(row["model"]), str(row["task"])), number(row["value"])
            if value is None or not str(row["metric"]).startswith("avg@") or place[1] in OVERALL:
                continue
            own = Interval(value, number(row.get("sampling_low")), number(row.get("sampling_high")))
            start = first.setdefault(place, own)
            change = None if start is own else total([own, -start])
            ends = (change.value, change.low, change.high) if change else (None, None, None)
            kept = {key: row.get(key) for key in COLUMNS if key in row}
            compared = dict(zip(("difference", "difference_low", "difference_high"), ends, strict=True))
            found.setdefault((*place, label), kept | {"protocol": label} | compared | {"published": bands.get(place)})
    models = list(dict.fromkeys((model, task) for model, task, _ in found))
    rows = sorted(found.items(), key=lambda item: models.index(item[0][:2]))
    return [{column: row.get(column) for column in COLUMNS} for _, row in rows]
