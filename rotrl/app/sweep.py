"""Multirun: an error line per failed job as it happens, one table over all jobs at the end."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from rotrl import config

RECORDLESS = {"plan_only", "verify", "doctor", "job"}  # what these ask for leaves no record


class SweepCallback(Callback):
    """Hydra calls on_multirun_end only when every job succeeded; `finish` is called in any case by `__main__`."""

    folder: Path | None = None  # of the multirun in progress
    began = 0  # by the file system's clock, as records are
    runs = True  # whether its jobs are runs

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        folder = SweepCallback.folder = Path(config.hydra.sweep.dir)
        SweepCallback.began = 0
        typed = {text.lstrip("+").partition("=")[0] for text in config.hydra.overrides.task}
        SweepCallback.runs = not RECORDLESS & typed
        with suppress(OSError):  # no folder yet, or one that can't be written: then all jobs there are shown
            os.utime(folder)  # jobs of an earlier multirun may lie there
            SweepCallback.began = folder.stat().st_mtime_ns

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        if config.hydra.mode is not None and config.hydra.mode.name == "MULTIRUN":
            print(f"\njob {config.hydra.job.num}: {config.hydra.job.override_dirname}", flush=True)

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        from hydra.core.utils import JobStatus

        if job_return.status == JobStatus.FAILED and SweepCallback.folder is not None:
            error = job_return._return_value
            print(f"job {config.hydra.job.num} failed: {_line(error)}", file=sys.stderr)


def _line(error: BaseException) -> str:
    return config.user_error(error, sys.argv[1:]) or repr(error)


def show_table() -> None:
    """The table over the jobs of the multirun that just ended, whether or not all of them succeeded."""
    folder = SweepCallback.folder
    if folder is None or not folder.is_dir():
        return
    import json

    from rich.console import Console

    from rotrl.report.sweep_page import render_sweep
    from rotrl.report.sweep_table import sweep_table

    jobs = (path for path in folder.glob("*/record.json") if path.parent.name.isdigit())
    paths = [path for path in jobs if path.stat().st_mtime_ns >= SweepCallback.began]
    paths.sort(key=lambda path: int(path.parent.name))  # a job that was refused has left no record
    records = [json.loads(path.read_text()) | {"job": int(path.parent.name)} for path in paths]
    if not (records or SweepCallback.runs):
        return
    console = Console()
    if records:
        sweep_table(records, console)
    if page := render_sweep(records, folder):
        console.print(f"report: {page}", highlight=False, markup=False)
