"""The table of a multirun holds its own jobs, whatever an earlier one left in its folder."""

from pathlib import Path
from typing import Any

import pytest

QUIET = ("evidence=none", "align=none", "evaluation=none", "logger=none")


def test_jobs_of_an_earlier_multirun_are_left_out(typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[tuple[int, str]]] = []

    def show(records: list[dict[str, Any]], _: Any) -> None:
        shown.append([(record["job"], *record["merges"]) for record in records])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rotrl.report.sweep_table.sweep_table", show)
    for merges, code in (("linear,slerp,ties", 0), ("linear,slerp", 0), ("learned,task_arithmetic", 2)):
        assert typed("-m", *QUIET, f"merge={merges}")[0] == code
    assert shown == [
        [(0, "linear"), (1, "slerp"), (2, "ties")],
        [(0, "linear"), (1, "slerp")],  # done before, and jobs of this multirun all the same
        [(1, "task_arithmetic")],  # learned is refused where nothing gives rotations
    ]
