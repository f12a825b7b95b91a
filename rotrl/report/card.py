"""The cards of merged models with what the run found: README.md of each where it is published.

A merge's own README.md is sealed by its manifest and written before anything is scored, so it says nothing of the run.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rotrl.checkpoint.files import whole_file
from rotrl.checkpoint.sidecar import CARD
from rotrl.report.notes import note_words, notes
from rotrl.report.redact import redact
from rotrl.report.standings import standings
from rotrl.report.table import markdown, scores_table
from rotrl.report.words import merge_words

SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")


def write_cards(record: Mapping[str, Any], run_dir: Path) -> list[Path]:
    """run_dir/model_cards/LABEL.md for every merge that has scores: its own card, then the run's table and verdict."""
    found, written = results(redact(record)), []
    for label in [row.model for row in standings(record).role("merge")]:
        own = (Path(record["merges"][label]["path"]) / CARD).read_text(encoding="utf-8")
        path = Path(run_dir) / "model_cards" / f"{label}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            text = f"{own.rstrip()}\n\n## Evaluation\n\n`{label}` is this model; {found}"
            temporary.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def results(record: Mapping[str, Any]) -> str:
    """How it was sampled, the table of all models, and the sentences of the report about the merges, as Markdown."""
    table = standings(record)
    view = scores_table(table, Console(file=io.StringIO(), width=10_000), "", notes(record))
    protocol = (record.get("config") or {}).get("protocol") or {}
    how = ", ".join(f"{key} {protocol[key]}" for key in SAMPLING if key in protocol)
    said = merge_words(table, record)
    said += [f"{key}: {sentence}" for key, sentences in note_words(record).items() for sentence in sentences]
    bullets = "\n".join(f"- {sentence}" for sentence in said)
    return f"{view.caption}.\n\n{markdown(view)}\n\nProtocol {protocol.get('name')}: {how}.\n\n{bullets}\n"
