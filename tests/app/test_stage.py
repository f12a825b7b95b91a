"""A stage runs once per content, continues after an interruption, and leaves its files in the run folder."""

import json
import os
from pathlib import Path

import pytest

from rotrl.app.provenance import process
from rotrl.app.stage import Stages, digest, source_digest


def stages(root: Path, run: str = "run") -> Stages:
    (root / run).mkdir(exist_ok=True)
    return Stages(root / "cache", root / run, lambda text: None)


def test_a_done_stage_is_reused_by_every_run_with_the_same_inputs(tmp_path: Path) -> None:
    calls = []

    def produce(out: Path) -> dict:
        calls.append(out)
        (out / "evidence").mkdir()
        (out / "evidence/lineage.csv").write_text("a,b\n")
        return {"verdict": "siblings"}

    first, second = stages(tmp_path), stages(tmp_path, "other")
    assert first.run("lineage", {"w": 1}, ["linalg"], produce) == {"verdict": "siblings"}
    assert second.run("lineage", {"w": 1}, ["linalg"], produce) == {"verdict": "siblings"}
    assert len(calls) == 1
    assert (tmp_path / "other/evidence/lineage.csv").read_text() == "a,b\n"
    assert not first.done["lineage"]["reused"]
    assert second.done["lineage"]["reused"]


def test_other_inputs_are_another_stage(tmp_path: Path) -> None:
    job = stages(tmp_path)
    results = [job.run("s", {"w": w}, ["linalg"], lambda out, w=w: {"w": w}) for w in (1, 2)]
    assert results == [{"w": 1}, {"w": 2}]


def test_an_interrupted_stage_is_not_done_and_continues_in_its_folder(tmp_path: Path) -> None:
    def interrupted(out: Path) -> dict:
        (out / "half").write_text("state")
        raise KeyboardInterrupt

    job = stages(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        job.run("align", 1, ["linalg"], interrupted)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run/half").exists()
    seen = job.run("align", 1, ["linalg"], lambda out: {"found": (out / "half").read_text()})
    assert seen == {"found": "state"}


def test_digest_sees_values_and_not_their_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})


def test_source_digest_covers_its_packages() -> None:
    assert source_digest(("linalg",)) != source_digest(("linalg", "merge"))


def test_two_runs_in_one_folder_end_alike(tmp_path: Path) -> None:
    """The slower one finds its work published by the other."""

    def faster(out: Path) -> dict:
        (out / "a.csv").write_text("a\n")
        return {"by": "any"}

    with pytest.raises(FileNotFoundError):  # what is missing for another reason stays an error
        stages(tmp_path).run("t", 1, ["linalg"], lambda out: {"text": (out / "absent").read_text()})
    found = stages(tmp_path)

    def write_late(out: Path) -> dict:
        stages(tmp_path).run("s", 1, ["linalg"], faster)
        return {"by": "any"}

    assert found.run("s", 1, ["linalg"], write_late) == {"by": "any"}
    assert (tmp_path / "run/a.csv").read_text() == "a\n"


def test_a_folder_where_a_run_is_at_work_is_refused(typed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("evidence=none", "align=none", "evaluation=none", "logger=none", "merge=linear", "run_dir=run")
    assert typed(*asked)[0] == 0
    file = tmp_path / "run/record.json"
    done = json.loads(file.read_text())
    file.write_text(json.dumps(done | {"status": "running", "process": process(os.getppid())}))
    code, line = typed(*asked)
    assert (code, line.count("\n")) == (2, 1), line
    assert f"run: process {os.getppid()} is at work on a run there; wait for it" in line
    begun_before_us = process(os.getppid()) | {"begun": "1"}  # its number came round again
    file.write_text(json.dumps(done | {"status": "running", "process": begun_before_us}))
    assert typed(*asked)[0] == 0
    assert json.loads(file.read_text())["status"] == "done"
