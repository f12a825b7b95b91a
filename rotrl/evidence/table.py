"""CSV files of evidence: fixed columns, empty cells for what a row does not have."""

import csv
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


def defined(value: float) -> float | None:
    """The number, or None (JSON null) where it is not defined."""
    return None if math.isnan(value) else float(value)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return "" if value is None else value
