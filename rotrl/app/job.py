"""What the stages of a run share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rotrl.app.prepare import Prepared
from rotrl.app.stage import Stages
from rotrl.report.record import Record


@dataclass
class Run:
    """What the stages share: the checked input, the run folder, the record and the terminal."""

    prepared: Prepared
    folder: Path
    record: Record
    stages: Stages
    console: Console
    files: dict[str, Path] | None = None  # samples of the experts, once a stage has asked for them

    @property
    def cfg(self) -> dict[str, Any]:
        return self.prepared.cfg

    @property
    def cache(self) -> Path:
        return Path(self.cfg["cache_dir"])

    def log(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return bar(self.console, title)


@contextmanager
def bar(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; gives the callable (done, total) that moves it."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
