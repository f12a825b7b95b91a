"""A stage runs once per content, continues after an interruption, and leaves its files in the run folder."""

from pathlib import Path

import pytest

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
