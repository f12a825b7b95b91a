"""The page of a multirun whose jobs compare, with its figure and tables."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rotrl.evaluate.output import write_csv
from rotrl.report import curves, figures, protocols
from rotrl.report.html import render
from rotrl.report.redact import redact

TABLES = ("protocols", "curves", "differences")


def render_sweep(records: list[dict[str, Any]], folder: Path) -> Path | None:
    """Writes report.html, figures and tables of a multirun whose jobs compare: protocols.csv where they differ in the
    protocol, curves.csv and differences.csv where they differ in a number; else None, each job has its own page.
    Those of an earlier multirun are removed."""
    remove_page(folder)
    if not records:
        return None
    records = redact(records)
    shown: dict[str, Any] = {"protocols": protocols.protocol_rows(records)}
    if shown["protocols"]:
        write_csv(folder / "protocols.csv", protocols.COLUMNS, shown["protocols"])
    elif found := curves.curves(records):
        shown["curves"] = found
        write_csv(folder / "curves.csv", curves.COLUMNS, found["rows"])
        write_csv(folder / "differences.csv", curves.DIFFERENCES, found["differences"])
    else:
        return None
    kept = {key: records[0].get(key) for key in ("name", "rotrl", "versions", "device", "created")}
    models = (records[0].get("models") or {}) | {"controls": {}}
    failed = [
        f"job {record.get('job', i)} {record['status']}: {record.get('error')}"
        for i, record in enumerate(records)
        if not done(record)
    ]
    joined = (
        kept
        | shown
        | {
            "status": "failed" if failed else "done",
            "finished": records[-1].get("finished"),
            "models": models,
            "jobs": [record.get("job", i) for i, record in enumerate(records) if done(record)],
            "command": "\n".join(str(record["command"]) for record in records if record.get("command")),
            "warnings": list(dict.fromkeys([*failed, *(text for r in records for text in r.get("warnings") or [])])),
            "config": {str(record.get("job", i)): record.get("config") for i, record in enumerate(records)},
        }
    )
    figures.draw(joined, folder)
    return render(joined, folder)


def remove_page(folder: Path) -> None:
    """Removes what an earlier multirun showed of its own jobs; the page, the last to be written, goes last."""
    page = folder / "report.html"
    if not page.exists():  # files of these names are then not of a multirun
        return
    drawn = [folder / "figures" / f"{name}.{kind}" for name in figures.FIGURES for kind in ("svg", "png")]
    with suppress(OSError):  # a place that can't be written keeps what it holds
        for file in (*drawn, *(folder / f"{name}.csv" for name in TABLES), page):
            file.unlink(missing_ok=True)
        (folder / "figures").rmdir()  # if there is one and the user has put nothing there


def done(record: Mapping[str, Any]) -> bool:
    return record.get("status") == "done"
