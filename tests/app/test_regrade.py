"""Grading without generating, from the command line: a run folder of its own, the old one untouched, no engine."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rotrl.app.regrade import as_typed
from rotrl.errors import ConfigError

PROBLEMS = [{"id": f"p{i}", "prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
CUSTOM = ("evaluation=custom", "evaluation.path=problems.jsonl", "protocol.ks=[1]", "logger=none", "name=t")


def rotrl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rotrl", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(model: str, right: int) -> list[dict]:
    texts = [rf"\boxed{{{i + 1 if i < right else 0}}}" for i in range(8)]
    return [{"model": model, "problem_id": f"p{i}", "completion": text} for i, text in enumerate(texts)]


def values(run: Path) -> dict[str, float]:
    with (run / "scores.csv").open() as file:
        return {row["model"]: float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "avg@1"}


def test_completions_are_graded_and_graded_again_without_an_engine(tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", PROBLEMS)
    write(tmp_path / "c.jsonl", [*answers("base", 2), *answers("math", 8), *answers("mine", 6)])
    first = rotrl(tmp_path, *CUSTOM, "evaluation.completions=c.jsonl")
    assert first.returncode == 0, first.stderr
    (run,) = (tmp_path / "outputs/t").iterdir()
    assert values(run) == {"base": 0.25, "math": 1.0, "mine": 0.75}
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "done"
    assert list(record["models"]["experts"]) == ["math"]
    assert list(record["merges"]) == ["mine"]
    assert "Completions from c.jsonl" in (run / "report.html").read_text()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    write(tmp_path / "problems.jsonl", [*PROBLEMS[:7], PROBLEMS[7] | {"answer": "0"}])
    again = rotrl(tmp_path, f"regrade={run}")
    assert again.returncode == 0, again.stderr
    (new,) = set((tmp_path / "outputs/t").iterdir()) - {run}
    assert values(new) == {"base": 0.375, "math": 0.875, "mine": 0.875}
    assert json.loads((new / "record.json").read_text())["config"]["protocol"]["ks"] == [1]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not (tmp_path / "outputs/cache/engine.log").exists()

    wrong = rotrl(tmp_path, f"regrade={run}", "protocol.grader=deepscalr")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: protocol.grader: 'deepscalr' is unknown")
    assert set((tmp_path / "outputs/t").iterdir()) == {run, new}


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", PROBLEMS)
    write(tmp_path / "c.jsonl", [*answers("base", 2), {"problem_id": "p9", "completion": ""}])
    done = rotrl(tmp_path, *CUSTOM, "evaluation.completions=c.jsonl")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "line 9: problems has no problem 'p9'" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "problems.jsonl"]


def test_what_was_typed_stands_above_the_old_configuration() -> None:
    old = {"name": "t", "evaluation": {"path": "a", "sandbox": {}}, "protocol": {"n": 4, "ks": [1]}, "seed": 3}
    now = {
        "name": "demo",
        "evaluation": {"path": None, "margin": 0.02, "select": None},
        "protocol": {"n": 8, "ks": [1, 4]},
    }
    now |= dict.fromkeys(
        ("run_dir", "cache_dir", "output", "plan_only", "overwrite", "debug", "logger", "doctor", "device")
    )
    now |= {"seed": 0, "verify": None, "regrade": "RUN"}
    found = as_typed(old, now, ["regrade=RUN", "protocol.ks=[1,4]"])
    assert found["protocol"] == {"n": 4, "ks": [1, 4]}
    assert found["evaluation"] == {"path": "a", "sandbox": {}, "margin": 0.02, "select": None, "completions": None}
    assert (found["name"], found["seed"], found["regrade"]) == ("t", 3, "RUN")
    assert old["protocol"]["ks"] == [1]
    assert as_typed(old, now, ["protocol=other"])["protocol"] == now["protocol"]
    with pytest.raises(ConfigError, match="merge changes none of them"):
        as_typed(old, now, ["regrade=RUN", "merge=ties"])
