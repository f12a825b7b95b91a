"""CSV files of evidence: fixed columns, empty cells for what a row does not have; and rows kept while they are made."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rotrl.checkpoint.files import whole_file


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows under the columns in one go; an undefined number (NaN) is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


class Work:
    """Rows by tensor, appended to a file as they come, so that a killed measurement goes on where it was.

    The first line says what the rows follow from (settings, hashes of the weights); a file that says otherwise starts
    anew, and a torn last line is dropped.
    """

    def __init__(self, path: Path, inputs: Any) -> None:
        self.path = path
        self.rows: dict[str, list[dict[str, Any]]] = {}
        head = json.dumps(inputs, sort_keys=True) + "\n"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        if lines and lines[0] == head:
            self.rows = dict(json.loads(line) for line in lines[1:] if line.endswith("\n"))
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [head, *(json.dumps([name, rows]) + "\n" for name, rows in self.rows.items())]
        with whole_file(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keeps the rows of one tensor, in memory and on disk."""
        self.rows[name] = rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, rows]) + "\n")


def defined(value: float) -> float | None:
    """The number, or None (JSON null) where it is not defined."""
    return None if math.isnan(value) else float(value)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with None for every number that is not defined, as JSON wants it."""
    return {key: defined(value) if isinstance(value, float) else value for key, value in row.items()}


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return "" if value is None else value
