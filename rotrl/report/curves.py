"""What a swept number does to every model, seeds averaged, and paired differences to the learned rotations."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotrl.report.standings import Interval, Row, number, paired, rotates, standings
from rotrl.report.sweep import swept
from rotrl.report.words import learned

COLUMNS = ("model", "role", "key", "value", "jobs", "mean", "low", "high", "lowest", "highest")
DIFFERENCES = ("a", "b", "key", "value", "jobs", "difference", "low", "high", "lowest", "highest")
SEED, ROLES = "seed", ("base", "expert", "merge")
Place = tuple[str, str]  # model, value


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`key`, its `values`, `rows` (COLUMNS), `differences` (DIFFERENCES), how many merges were `tried` and the
    experts' `ceiling`, each on its own task; empty where no number was swept.

    A model whose weights and score are the same at every value has one row, without a value. Jobs that differ in the
    seed alone are averaged; they share their problems, so the ends of their intervals are averaged too: wide enough
    however the jobs depend on each other. `lowest` and `highest` are the extremes over the seeds.
    """
    given = swept(records)
    key = swept_number(given)
    if key is None:
        return {}
    cells: dict[Place, list[tuple[Row, Mapping[str, Any]]]] = {}
    tables, several = [standings(record) for record in records], _several(records)
    for record, table, own in zip(records, tables, given, strict=True):
        rest = " ".join(f"{name}={value}" for name, value in own.items() if name not in (key, SEED))
        for row in table.rows:
            if row.mean:
                name = f"{row.model} {rest}".strip() if row.role == "merge" or row.model in several else row.model
                cells.setdefault((name, own[key]), []).append((row, record))
    if not cells:
        return {}
    ceilings = [table.ceiling for table in tables if table.ceiling is not None]
    reported = max((table.reported for table in tables), key=len)
    values = sorted({own[key] for own in given}, key=_order)
    cells = _flattened(cells)
    rows = [_row(name, value, key, found) for (name, value), found in cells.items()]
    best = {row["model"]: max(r["mean"] for r in rows if r["model"] == row["model"]) for row in rows}
    return {
        "key": key,
        "values": values,
        "rows": sorted(rows, key=lambda row: (ROLES.index(row["role"]), -best[row["model"]], _order(row["value"]))),
        "differences": differences(cells, key, values, reported),
        "tried": sum(row["role"] == "merge" for row in rows),
        "ceiling": sum(ceilings) / len(ceilings) if ceilings else None,
    }


def _several(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of experts that have other weights in other jobs."""
    weights: dict[str, set[Any]] = {}
    for record in records:
        for name, facts in ((record.get("models") or {}).get("experts") or {}).items():
            weights.setdefault(name, set()).add(facts.get("sha256"))
    return {name for name, found in weights.items() if len(found) > 1}


def by_value(rows: Sequence[Mapping[str, Any]], *names: str) -> dict[tuple[str, ...], dict[str, Interval]]:
    """Rows of one table as a line for each model or pair: {names: {value: interval}}."""
    found: dict[tuple[str, ...], dict[str, Interval]] = {}
    for row in rows:
        place = tuple(row[name] for name in names)
        middle = row["mean"] if "mean" in row else row["difference"]
        found.setdefault(place, {})[row["value"]] = Interval(middle, row["low"], row["high"])
    return found


def in_words(value: str) -> str:
    return "no limit" if number(value) is None else value


def swept_number(given: Sequence[Mapping[str, str]]) -> str | None:
    """The key whose values are numbers (or `None`, no limit), the one with the most values where there are several."""
    found: dict[str, int] = {}
    for key in given[0] if given else ():
        values = {own[key] for own in given}
        numbers = {value for value in values if number(value) is not None}
        if key != SEED and len(numbers) > 1 and values - numbers <= {"None"}:
            found[key] = len(values)
    return max(found, key=lambda key: found[key]) if found else None


def differences(
    cells: Mapping[Place, list[tuple[Row, Mapping[str, Any]]]], key: str, values: Sequence[str], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """Learned rotations minus every other merge at each value, mean over tasks, paired by problem."""
    merges = {name: found for (name, _), found in cells.items() if found[0][0].role == "merge"}
    turning = [
        name
        for name, ((row, record), *_) in merges.items()
        if (name, "") not in cells and learned(row.model, record) and rotates(row.model, record)
    ]
    found = []
    for a in turning:
        for b in (name for name in merges if name != a):
            for value in values:
                there = cells.get((b, value)) or cells.get((b, ""), [])
                pairs = [
                    paired(row.model, other.model, record, tasks)
                    for row, record in cells.get((a, value), [])
                    for other, its in there
                    if its is record or (its["config"].get(SEED) == record["config"].get(SEED) and (b, "") in cells)
                ]
                known = [pair for pair in pairs if pair]
                if known:
                    found.append({"a": a, "b": b, "key": key, "value": value, **_average(known, "difference")})
    return found


def _flattened(cells: dict[Place, list[tuple[Row, Mapping[str, Any]]]]) -> dict[Place, Any]:
    """Models of the same weights and score at every value in one place without a value, once for each seed; base and
    experts, which every job has, once for each seed at each value too."""
    found: dict[Place, Any] = {}
    for name in dict.fromkeys(name for name, _ in cells):
        own = {value: entries for (other, value), entries in cells.items() if other == name}
        once = _once([entry for entries in own.values() for entry in entries])
        if len(own) > 1 and len({_seed(record) for _, record in once}) == len(once):
            found[name, ""] = once
        else:
            merge = once[0][0].role == "merge"
            found |= {(name, value): entries if merge else _once(entries) for value, entries in own.items()}
    return found


def _once(entries: list[tuple[Row, Mapping[str, Any]]]) -> list[tuple[Row, Mapping[str, Any]]]:
    """The first of each seed, weights and score."""
    found: dict[Any, tuple[Row, Mapping[str, Any]]] = {}
    for row, record in entries:
        weights = ((record.get("merges") or {}).get(row.model) or {}).get("sha256", row.model)
        found.setdefault((_seed(record), weights, row.mean), (row, record))
    return list(found.values())


def _seed(record: Mapping[str, Any]) -> Any:
    return (record.get("config") or {}).get(SEED)


def _row(name: str, value: str, key: str, found: list[tuple[Row, Any]]) -> dict[str, Any]:
    means = [row.mean for row, _ in found if row.mean]
    return {"model": name, "role": found[0][0].role, "key": key, "value": value, **_average(means, "mean")}


def _average(intervals: list[Interval], name: str) -> dict[str, Any]:
    values = [interval.value for interval in intervals]
    known = all(interval.known for interval in intervals)
    low, high = (
        sum(end or 0.0 for end in ends) / len(values) if known else None
        for ends in zip(*((interval.low, interval.high) for interval in intervals), strict=True)
    )
    mean = sum(values) / len(values)
    return {"jobs": len(values), name: mean, "low": low, "high": high, "lowest": min(values), "highest": max(values)}


def _order(value: str) -> float:
    found = number(value)
    return float("inf") if found is None else found
