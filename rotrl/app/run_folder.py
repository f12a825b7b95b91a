"""How a run folder is opened, found finished, and closed."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from rotrl.app import provenance
from rotrl.errors import ConfigError
from rotrl.report.record import Record


def done_before(record: Record, digest: str, cfg: dict[str, Any], console: Console) -> bool:
    """Shows a run that has nothing left to do."""
    done = record.data.get("status") == "done" and record.data["digest"] == digest and not cfg["overwrite"]
    if done:
        folder = record.path.parent
        if folder.name.isdigit():
            with suppress(OSError):  # a place that can't be written shows its runs all the same
                os.utime(record.path)  # a multirun tells its own jobs by it
        console.print(f"done before, nothing to do: {folder} (overwrite=true does it again)", highlight=False)
        show(record.data, console)
    return done


def settle(
    cfg: dict[str, Any],
    digest: str,
    weights: dict[str, str],
    reads: Iterable[Path],
    folder: Path,
    old: dict[str, Any],
) -> None:
    """Makes the run folder. One that the user named and that holds another run is refused, naming what differs; in a
    multirun, which numbers its folders, the older run is moved aside, unless it holds what this one `reads`."""
    if provenance.at_work(old):
        number = old["process"]["number"]
        raise ConfigError(
            f"{folder}: process {number} is at work on a run there; wait for it or choose another run_dir"
        )
    if goes_aside(folder, cfg, digest, old):
        check_movable(folder, cfg, reads, old)
        folder.rename(folder.with_name(f"{folder.name}.{old['digest'][:8]}.{int(time.time())}"))
    elif old and old["digest"] != digest:
        changed = provenance.differing_keys(old, cfg, weights)
        raise ConfigError(f"{folder} holds another run ({changed} differ); choose another run_dir or overwrite=true")
    folder.mkdir(parents=True, exist_ok=True)


def goes_aside(folder: Path, cfg: dict[str, Any], digest: str, old: dict[str, Any]) -> bool:
    """Whether the run in the folder is moved aside for the run of this digest; not where the user named the folder."""
    return bool(old) and (cfg["overwrite"] or (folder != Path(cfg["run_dir"] or "") and old["digest"] != digest))


def check_movable(folder: Path, cfg: dict[str, Any], reads: Iterable[Path], old: dict[str, Any]) -> None:
    """ConfigError where another machine may be writing in the folder, or this run reads what lies there."""
    if provenance.of_another_machine(old) and not cfg["overwrite"]:
        raise ConfigError(
            f"{folder}: a run of another machine is or was at work there; choose another hydra.sweep.dir, or "
            "overwrite=true if it has ended"
        )
    for path in reads:
        if path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{folder} holds {path}, which this run reads, and would be moved aside; choose another run_dir, in a "
                "multirun hydra.sweep.dir"
            )


def anchored(data: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Any]:
    """Published bands and training windows beside the scores of a record."""
    from rotrl.evaluate.anchors import beside

    ids, merges = provenance.identities(cfg, data["models"]), data.get("merges") or {}
    return beside(data["scores"], ids, list(merges), cfg["evaluation"]["tasks"], cfg["protocol"])


def finish(record: Record, folder: Path, console: Console, logger: dict[str, Any] | None) -> None:
    """The record is complete; the figures, the page, the table and W&B are projections of it."""
    from rotrl.report import figures, html, tracker

    data = record.data
    data |= {"status": "done", "finished": provenance.now()}
    record.save()
    figures.draw(data, folder)
    page = html.render(data, folder)
    show(data, console)
    console.print(f"report: {page}", highlight=False, markup=False)
    if logger:
        tracker.log(data, folder, logger)


def show(record: dict[str, Any], console: Console) -> None:
    from rotrl.report import table

    table.show(record, console)
