"""The whole chain on the tiny pair at a reduced size, through real vLLM: the demo, a kill, a sweep."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rotrl.checkpoint.rotations import open_rotations
from rotrl.checkpoint.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = (
    "evaluation.tasks.tiny_math.limit=24",
    "evaluation.tasks.tiny_code.limit=24",
    "protocol.n=2",
    "protocol.ks=[1,2]",
    "models.prompts.math.limit=24",
    "models.prompts.code.limit=24",
    "align.steps=6",
    "align.samples.n=1",
)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rotrl", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rotrl(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, err
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def samples(run: Path) -> dict[str, dict]:
    """Every sample of a run by model, problem and index: what was asked, said and found."""
    found = {}
    for path in (run / "samples").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = f"{path.stem} {row['task']} {row['problem_id']} {row['sample_index']}"
            found[key] = {k: row[k] for k in ("seed", "prompt_sha256", "completion", "verdict", "model_sha256")}
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    out = rotrl(folder, *SMALL)
    return next((folder / "outputs/demo").iterdir()), out


def test_the_run_folder_keeps_its_contract(demo: tuple[Path, str]) -> None:
    run, _ = demo
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "done"
    assert record["lineage"]["verdict"] == "siblings"
    assert record["sandbox_level"] in ("bubblewrap", "landlock")
    models = {"base", "math", "code", *record["merges"]}
    assert len(record["merges"]) >= 8
    assert {row["model"] for row in rows(run / "scores.csv")} == models
    assert {path.stem for path in (run / "samples").glob("*.jsonl")} == models
    assert len(samples(run)) == len(models) * 2 * 24 * 2
    for name in ("lineage.csv", "geometry.csv"):
        assert rows(run / "evidence" / name)
    for name in ("share_vs_null", "tasks_scatter"):
        assert (run / f"figures/{name}.svg").stat().st_size > 1000
    assert "<html" in (run / "report.html").read_text()
    assert list((run / "wandb").glob("**/*.wandb"))
    assert not (run / ".work").exists()


def test_every_score_has_its_intervals_and_every_merge_meets_both_experts(demo: tuple[Path, str]) -> None:
    run, _ = demo
    for row in rows(run / "scores.csv"):
        assert 0 <= float(row["low"]) <= float(row["value"]) <= float(row["high"]) <= 1
    pairs = {(row["a"], row["b"]) for row in rows(run / "comparisons.csv")}
    merges = json.loads((run / "record.json").read_text())["merges"]
    assert {(merge, other) for merge in merges for other in ("base", "math", "code")} <= pairs


def test_merges_and_rotations_are_valid_and_say_where_they_come_from(demo: tuple[Path, str]) -> None:
    run, _ = demo
    for folder in (run / "merged").iterdir():
        verify(folder)
        card = (folder / "README.md").read_text()
        finished = (run / "model_cards" / f"{folder.name}.md").read_text()
        assert finished.startswith(card.rstrip())
        assert all(f"\n| {name} " in finished for name in ("base", "math", "code", folder.name))
    rotations = open_rotations(run / "rotations.safetensors")
    assert json.loads(rotations.metadata["teachers"]) == ["math", "code"]
    assert float(rotations.metadata["orthogonality_error"]) < 1e-5


def test_the_table_shows_every_model_and_the_second_run_does_nothing(demo: tuple[Path, str]) -> None:
    run, out = demo
    for word in ("base", "learned", "tsv_m", "merges"):
        assert word in out
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = rotrl(run.parents[2], *SMALL)
    assert "done before, nothing to do" in again
    assert written == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_that_stops_a_run_is_told_to_queue_it_again(number: signal.Signals, tmp_path: Path) -> None:
    command = ("evidence=geometry", "align=none", "merge=none", "evaluation=none", "logger=none")
    process = start(tmp_path, *command)
    records = tmp_path / "outputs/demo"
    while process.poll() is None and not list(records.glob("*/record.json")):
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 75
    (record,) = records.glob("*/record.json")
    assert json.loads(record.read_text())["status"] == "interrupted"
    rotrl(tmp_path, *command)
    assert json.loads(record.read_text())["status"] == "done"


def test_a_kill_during_evaluation_loses_nothing_and_changes_nothing(demo: tuple[Path, str], tmp_path: Path) -> None:
    process = start(tmp_path, *SMALL)
    store = tmp_path / "outputs/cache/samples"
    while process.poll() is None and sum(p.stat().st_size for p in store.rglob("*") if p.is_file()) < 40_000:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run = next((tmp_path / "outputs/demo").iterdir())
    assert json.loads((run / "record.json").read_text())["status"] == "running"
    rotrl(tmp_path, *SMALL)
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "done"
    assert record["stages"]["evaluate"]["reused"] > 0
    assert samples(run) == samples(demo[0])


def test_a_sweep_has_one_engine_and_one_table(tmp_path: Path) -> None:
    arguments = ["merge=linear,task_arithmetic,orthomerge", "align=none", "evidence=none", "logger=none", *SMALL[:4]]
    out = rotrl(tmp_path, "-m", *arguments)
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "multirun/demo").glob("*/record.json"))]
    assert [list(record["merges"]) for record in records] == [["linear"], ["task_arithmetic"], ["orthomerge"]]
    assert [record["stages"]["evaluate"]["reused"] for record in records] == [0, 288, 288]  # base and experts once
    log = (tmp_path / "outputs/cache/engine.log").read_text()
    assert len(re.findall(r"^engine \d+ starts", log, re.MULTILINE)) == 1
    table = out[out.rindex("job 2") :]
    assert all(name in table for name in ("linear", "task_arithmetic", "orthomerge"))
