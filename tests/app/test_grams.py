"""The Gram stage within a run: gathered once an expert, found again, refused where it can't be."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from rotrl import config
from rotrl.app.descent import settled
from rotrl.app.job import Run
from rotrl.app.pipeline import merge
from rotrl.app.plan import show_plan
from rotrl.app.prepare import prepare
from rotrl.app.samples import grams
from rotrl.app.stage import Stages
from rotrl.checkpoint.verify import verify
from rotrl.errors import ConfigError
from rotrl.report.record import Record
from rotrl.zoo import zoo_path

QUIET = ("evidence=none", "align=none", "evaluation=none", "logger=none")


def settings(*overrides: str) -> dict:
    found = OmegaConf.to_container(config.compose([*QUIET, *overrides]), resolve=True, throw_on_missing=True)
    assert isinstance(found, dict)
    return found


def samples(folder: Path, name: str, tokens: int) -> Path:
    path = folder / f"{name}-{tokens}.jsonl"
    rows = [{"prompt_ids": [1, 2, 3 + i], "completion_ids": [5] * tokens, "problem_id": str(i)} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def job(tmp_path: Path):
    """A run of regmean whose experts are sampled already: token ids of the tiny pair's vocabulary."""

    def make(tokens: int = 3, *overrides: str) -> Run:
        prepared = prepare(settings("merge=regmean", f"cache_dir={tmp_path}/cache", *overrides))
        stages = Stages(tmp_path / "cache", tmp_path / "run", print)
        files = {"math": samples(tmp_path, "math", 3), "code": samples(tmp_path, "code", tokens)}
        prepared = replace(prepared, vectors=prepared.experts)
        return Run(prepared, tmp_path / "run", Record(tmp_path / "run/record.json"), stages, Console(), files)

    return make


def test_gathered_once_by_weights_and_samples(job) -> None:
    first, again, other = job(), job(), job(4)
    folders = grams(first)
    assert not first.stages.done["grams"]["reused"]
    assert grams(again) == folders
    assert again.stages.done["grams"] | {"seconds": 0} == first.stages.done["grams"] | {"seconds": 0, "reused": True}
    changed = grams(other)
    assert changed["math"] == folders["math"]
    assert changed["code"] != folders["code"]
    assert grams(job(4, "merge.gram.layers=1", "merge.gram.batch=2")) == changed  # how, not what
    assert grams(job(4, "merge.gram.max_tokens=4")).items().isdisjoint(changed.items())


def test_the_merge_reads_what_the_stage_left(job, tmp_path: Path) -> None:
    run = job()
    run.record.data = {"warnings": []}
    merge(run)
    made = run.record.data["merges"]["regmean"]
    manifest = verify(Path(made["path"]))
    assert manifest["inputs"]["grams"].keys() == {"math", "code"}
    assert made["warnings"] == []
    assert list(run.stages.done) == ["grams", "merge/regmean"]


def test_a_rebased_expert_is_gathered_as_it_is_merged(job) -> None:
    run = job(3, "models.rebase={code: math}")
    run.prepared, _ = settled(run.prepared, {})
    run.record.data = {"warnings": []}
    merge(run)
    assert run.prepared.vectors["code"].path.parent == run.cache / "models"


def test_the_plan_tells_size_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(settings("merge=regmean", "merge.gram.layers=1"))
    said = " ".join(capsys.readouterr().out.split())
    size = 4 * (3 * 96**2 + 256**2) / 1e9
    assert f"Gram matrices 2 x {3 * size:.3f} GB in outputs/cache/grams, {size:.3f} GB in memory, 3 passes" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["merge=regmean", "models.prompts=null"], "models.prompts.math is not set"),
        (["merge=regmean", "merge.gram.samples=null"], "merge.gram.samples is not set"),
        (["merge=regmean", "merge.gram.layers=0"], "merge.gram.layers is 0, it must be 1 or more"),
        (["merge=regmean", "merge.gram=3"], "merge.gram is 3, a map of layers, batch"),
        (["merge=regmean", "+merge.gram.layrs=3"], "merge.gram.layrs of the Gram stage, did you mean 'layers'?"),
        (["merge=ties", "+merge.gram={layers: 3}"], "unknown parameter merge.gram of ties"),
        (["merge=none", "align=stiefel", "merge@align.start=regmean"], "align.start is regmean, which needs Gram"),
        (["merge=none", "align=lora", "merge@align.start=ties", "align.start.density=30"], "align.start.density is 30"),
        (
            ["merge=closed_form", "+merge@merge.a=regmean", "+merge@merge.b=regmean", "merge.b.gram.samples.n=3"],
            "merge.b.gram.samples differs from merge.a's",
        ),
    ],
)
def test_what_can_not_be_gathered_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(settings(*overrides))
    assert words in str(caught.value)


def test_a_start_without_a_scale_is_bound() -> None:
    prepared = prepare(settings("merge=none", "align=stiefel", "merge@align.start=linear"))
    assert "scale" not in prepared.cfg["align"]["start"]


def test_under_another_method_and_in_a_suite() -> None:
    prepared = prepare(settings("merge=svc", "merge@merge.of=regmean"))
    assert prepared.gram is not None
    assert list(prepared.prompts) == ["math", "code"]
    suite = prepare(settings("merge=closed_form", "+merge@merge.mine=regmean"))
    assert "mine" in suite.methods
    assert suite.sampled() == ["math", "code"]
    assert zoo_path("math") == suite.experts["math"].path


@pytest.mark.slow
def test_from_samples_to_scores_and_not_twice(tmp_path: Path) -> None:
    arguments = ["merge=regmean", *QUIET[:2], "logger=none", "run_dir=run", "protocol.n=2", "protocol.ks=[1]"]
    arguments += [f"{where}.limit=12" for where in ("models.prompts.math", "models.prompts.code")]
    arguments += [f"evaluation.tasks.tiny_{task}.limit=8" for task in ("math", "code")]
    first, second = (
        subprocess.run(
            [sys.executable, "-m", "rotrl", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert {"rollouts", "grams", "merge/regmean", "evaluate"} <= record["stages"].keys()
    assert {row["model"] for row in record["scores"]} == {"base", "math", "code", "regmean"}
    assert "done before" in second.stdout
