"""The jobs of a multirun as one record: base and experts once, every merge under its label and what was swept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NOT_SWEPT = ("run_dir", "output", "merge._")  # where a job writes, and what its label says already


def as_one_record(records: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The joined record and a line for every job that did not end well."""
    joined: dict[str, Any] = {"models": {"experts": {}}, "merges": {}, "scores": [], "comparisons": []}
    failures: list[str] = []
    seen: set[str] = set()
    for place, (record, swept) in enumerate(zip(records, swept_keys(records), strict=True)):
        job = record.get("job", place)
        if record.get("status") != "done":
            failures.append(f"job {job} {f'({swept}) ' if swept else ''}{record.get('status')}: {record.get('error')}")
        names = {label: _name(label, swept, job, joined["merges"]) for label in record.get("merges") or {}}
        joined["models"]["experts"] |= (record.get("models") or {}).get("experts") or {}
        joined["merges"] |= {names[label]: made for label, made in (record.get("merges") or {}).items()}
        rows = [row for row in record.get("scores") or [] if row["model"] in names or row["model"] not in seen]
        seen |= {row["model"] for row in rows}
        joined["scores"] += [row | {"model": names.get(row["model"], row["model"])} for row in rows]
        joined["comparisons"] += [
            row | {side: names.get(row[side], row[side]) for side in ("a", "b")}
            for row in record.get("comparisons") or []
        ]
    return joined, failures


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
