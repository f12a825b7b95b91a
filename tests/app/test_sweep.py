"""The table of a multirun holds its own jobs, whatever an earlier one left in its folder, which it may take."""

import json
from pathlib import Path
from typing import Any

import pytest

QUIET = ("evidence=none", "align=none", "evaluation=none", "logger=none")
DROPPED = ("learned", "slerp", "tsv_m", "split_task_arithmetic", "orthomerge", "geodesic")  # of the suite, to be quick


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


def test_single_merges_take_the_folders_of_a_suite(typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = [f"~merge.{label}" for label in DROPPED]
    assert typed("-m", *QUIET, "merge=suite", *few, "seed=0,1")[0] == 0
    assert (tmp_path / "multirun/demo/0/merged/linear").is_dir()
    code, told = typed("-m", *QUIET, "merge=linear,ties")
    assert code == 0, told
    assert (tmp_path / "multirun/demo/0/merged/config.json").is_file()


def test_a_run_of_another_machine_keeps_its_folder(typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed("-m", *QUIET, "merge=linear,ties")[0] == 0
    file = tmp_path / "multirun/demo/0/record.json"
    old = json.loads(file.read_text())
    file.write_text(json.dumps(old | {"status": "running", "process": old["process"] | {"machine": "other"}}))
    code, told = typed("-m", *QUIET, "merge=slerp,ties")
    assert (code, "multirun/demo/0: a run of another machine is or was at work there" in told) == (2, True), told
    assert json.loads(file.read_text())["status"] == "running"
    assert typed("-m", *QUIET, "merge=linear,ties")[0] == 0  # the same run goes on


def test_a_folder_that_the_run_reads_is_not_moved_aside(typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed("-m", *QUIET, "merge=linear,ties")[0] == 0
    merged = tmp_path / "multirun/demo/1/merged"
    code, told = typed("-m", *QUIET, f"models.experts.math={merged}", "merge=linear,slerp")
    assert (code, f"holds {merged}, which this run reads" in told) == (2, True), told
    assert (merged / "config.json").is_file()


def test_a_page_goes_where_every_job_is_refused_and_stays_where_none_runs(typed, tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "multirun/demo/report.html"
    page.parent.mkdir(parents=True)
    page.touch()
    monkeypatch.chdir(tmp_path)
    assert typed("-m", *QUIET, "merge=linear", "seed=0,1", "plan_only=true")[0] == 0
    assert page.exists()
    assert typed("-m", *QUIET, "merge=learned", "seed=0,1")[0] == 2
    assert not page.exists()
