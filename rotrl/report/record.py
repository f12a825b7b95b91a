"""The record of a run: `record.json` is the truth; the table, the page, the figures and W&B are projections of it.

record = Record(run_dir / "record.json")    # what an earlier run left there, or empty
record.data["scores"] = rows
record.save()
Record.open(run_dir).data["scores"]         # an error where there is no record
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotrl.checkpoint.files import whole_file
from rotrl.errors import ConfigError
from rotrl.report.redact import redact


@dataclass
class Record:
    """One JSON object a run; a reader takes every field as optional.

    rotrl, name, digest, command, created, finished; status: running, done, interrupted, failed (then `error`);
    config (resolved); models: {base: {path, sha256}, experts: {name: ..}, controls: {name: ..}}; versions, device,
    sandbox_level, prompt_sha256; stages: {name: {key, seconds, reused}}; lineage, geometry, align: the summaries of
    these stages; merges: {label: {path, sha256, effective_coefficient, norm_ratio, storage_loss, dtype, config}};
    scores, comparisons: the rows of the CSV files; decisions, warnings: sentences.
    """

    path: Path
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if not self.data and self.path.is_file():
            self.data = _read(self.path)

    @classmethod
    def open(cls, path: Path) -> "Record":
        """The record in a file or in a run folder. Raises ConfigError where there is none."""
        path = Path(path)
        file = path / "record.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{file}: no record here; give a run folder that holds record.json")
        return cls(file)

    def save(self) -> None:
        """Replaces the file whole; what is written holds no secrets and no NaN."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(redact(self.data), indent=1, ensure_ascii=False, allow_nan=False)
        with whole_file(self.path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not a record ({error}); remove it and run the command again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds a {type(data).__name__} and no record; remove it and run the command again")
    return data
