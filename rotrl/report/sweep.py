"""The jobs of a multirun as one record: base and experts once, every merge under its label and what was swept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rotrl.report.standings import OVERALL

NOT_SWEPT = ("run_dir", "output", "merge._")  # where a job writes, and what its label says already


def as_one_record(records: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The joined record and a line for every job that did not end well.

    Experts of one name and other weights are told apart like merges are. Where the jobs have other tasks there is no
    mean over tasks that all of them share.
    """
    joined: dict[str, Any] = {"models": {"experts": {}}, "merges": {}, "scores": [], "comparisons": []}
    joined["config"] = {"evaluation": {"select": _select(records[0])}} if records else {}
    failures: list[str] = []
    seen: set[tuple[str, str]] = set()
    experts: dict[tuple[str, Any], str] = {}
    left_out = OVERALL if len({tasks for record in records if (tasks := _tasks(record))}) > 1 else ()
    for place, (record, swept) in enumerate(zip(records, swept_keys(records), strict=True)):
        job = record.get("job", place)
        if record.get("status") != "done":
            failures.append(f"job {job} {f'({swept}) ' if swept else ''}{record.get('status')}: {record.get('error')}")
        names = {label: _name(label, swept, job, joined["merges"]) for label in record.get("merges") or {}}
        joined["merges"] |= {names[label]: made for label, made in (record.get("merges") or {}).items()}
        for name, facts in ((record.get("models") or {}).get("experts") or {}).items():
            taken, weights = joined["models"]["experts"], facts.get("sha256")
            new = _name(name, swept, job, taken) if name in taken else name
            names[name] = experts.setdefault((name, weights), new)
            taken[names[name]] = facts
        rows = [row | {"model": names.get(row["model"], row["model"])} for row in record.get("scores") or []]
        rows = [row for row in rows if (row["model"], row["task"]) not in seen and row["task"] not in left_out]
        seen |= {(row["model"], row["task"]) for row in rows}
        joined["scores"] += rows
        joined["comparisons"] += [
            row | {side: names.get(row[side], row[side]) for side in ("a", "b")}
            for row in record.get("comparisons") or []
            if row.get("task") not in left_out
        ]
    return joined, failures


def _select(record: Mapping[str, Any]) -> Any:
    return ((record.get("config") or {}).get("evaluation") or {}).get("select")


def _tasks(record: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(row["task"] for row in record.get("scores") or []) - {*OVERALL}


def swept_keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each job `key=value` of the keys whose values differ between the jobs."""
    return [", ".join(f"{key}={value}" for key, value in own.items()) for own in swept(records)]


def swept(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each job the keys whose values differ between the jobs, with its values; of keys that move together, one."""
    flat = [dict(_flatten(record.get("config") or {})) for record in records]
    shared = [key for key in (flat[0] if flat else {}) if all(key in job for job in flat)]
    methods = [str(job.get("merge._target_")) for job in flat]
    differing: dict[tuple[str, ...], str] = {}
    for key in sorted(shared, key=lambda key: (key.count("."), key)):
        values = tuple(str(job[key]) for job in flat)
        of_method = key.startswith("merge.") and len(set(zip(methods, values, strict=True))) == len(set(methods))
        if len(set(values)) > 1 and not of_method and not key.startswith(NOT_SWEPT):
            differing.setdefault(values, key)
    return [{key: str(job[key]) for key in differing.values()} for job in flat]


def _name(label: str, swept: str, job: int, taken: Mapping[str, Any]) -> str:
    name = f"{label} {swept}".strip()
    return f"{name} job {job}" if name in taken else name


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
