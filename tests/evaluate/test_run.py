"""Evaluation as a whole on the tiny pair: what it writes, reuses, refuses, and continues after a kill."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate.rollouts import rollouts
from rotrl.evaluate.run import evaluate
from rotrl.evaluate.samples import Sampler
from rotrl.evaluate.scores import COMPARISONS, SCORES
from rotrl.evaluate.task import Task
from rotrl.zoo import zoo_path
from rotrl.zoo.tasks import code_task, math_task

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 256, "threads": 1, "max_model_len": None}
PROTOCOL = {"name": "tiny", "n": 4, "ks": [1, 4], "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 48}
SANDBOX = {"minimum": "landlock", "allow_unsandboxed": False}
ROLES = {"base": "base", "math": "expert", "code": "expert", "merge": "merge"}


def tasks(limit: int = 20) -> list[Task]:
    return [math_task(split="test", limit=limit), code_task(split="test", limit=limit)]


def run(folder: Path, models: dict[str, Path], chosen: list[Task], **changes) -> dict:
    settings = {"protocol": PROTOCOL, "engine": ENGINE, "sandbox": SANDBOX, "cache": folder / "cache", "seed": 0}
    weights = {name: open_checkpoint(path).sha256 for name, path in models.items()}
    return evaluate(models, chosen, roles=ROLES, weights=weights, out=folder / "run", **settings | changes)


def average(target: Path, weight: float) -> Path:
    target.mkdir(exist_ok=True)
    for file in zoo_path("base").iterdir():
        shutil.copy(file, target)
    math, code = (load_file(zoo_path(name) / "model.safetensors") for name in ("math", "code"))
    mixed = {name: (1 - weight) * math[name] + weight * code[name] for name in math}
    save_file(mixed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_writes_the_contract_reuses_everything_and_grows_by_n(tmp_path):
    models = {name: zoo_path(name) for name in ("base", "math", "code")} | {"merge": average(tmp_path / "merge", 0.5)}
    seen = []
    first = run(tmp_path, models, tasks(), progress=lambda done, total: seen.append((done, total)))
    out = tmp_path / "run"
    assert (first["generated"], first["reused"], first["alarms"]) == (640, 0, [])
    assert seen[-1] == (640, 640)
    assert first["sandbox_level"] in ("bubblewrap", "landlock")
    assert sorted(file.name for file in (out / "samples").iterdir()) == [f"{name}.jsonl" for name in sorted(models)]
    rows = lines(out / "samples" / "math.jsonl")
    assert len(rows) == 160
    assert {row["model_sha256"] for row in rows} == {open_checkpoint(models["math"]).sha256}
    for columns, name in ((SCORES, "scores"), (COMPARISONS, "comparisons")):
        table = list(csv.DictReader((out / f"{name}.csv").open()))
        assert tuple(table[0]) == columns
        assert [dict.fromkeys(columns) | row for row in first[name]] == first[name]
        assert len(table) == len(first[name])
    value = {(row["model"], row["task"]): row["value"] for row in first["scores"] if row["metric"] == "avg@4"}
    correct = [row["verdict"] == "accepted" for row in rows if row["task"] == "tiny_math"]
    assert value["math", "tiny_math"] == pytest.approx(sum(correct) / len(correct), abs=1e-6)
    assert value["math", "tiny_math"] > value["base", "tiny_math"] + 0.2
    assert value["code", "tiny_code"] > value["base", "tiny_code"] + 0.2

    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    again = run(tmp_path, models, tasks())
    assert (again["generated"], again["reused"], again["tokens_per_second"]) == (0, 640, 0)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before

    more = run(tmp_path, {"base": models["base"]}, tasks(), protocol=PROTOCOL | {"n": {"tiny_math": 6, "default": 4}})
    assert (more["generated"], more["reused"]) == (40, 160)

    average(models["merge"], 0.9)  # other weights in the same folder: nothing old may answer
    other = run(tmp_path, {"merge": models["merge"]}, tasks())
    assert (other["generated"], other["reused"]) == (160, 0)

    kept = tmp_path / "cache" / "samples" / open_checkpoint(models["math"]).sha256[:16] / "text"
    (store,) = kept.glob("*.jsonl")
    store.write_bytes(store.read_bytes().replace(b'"row"', b'"raw"', 3))
    healed = run(tmp_path, models | {"merge": average(models["merge"], 0.5)}, tasks())
    assert healed["generated"] == 3
    assert healed["alarms"] == ["3 stored samples were damaged: set aside and made again"]
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run import PROTOCOL, run, tasks, zoo_path
run(Path({folder!r}), {{"base": zoo_path("base")}}, tasks(60), protocol=PROTOCOL | {{"n": 32}})
"""


@pytest.mark.slow
def test_after_sigkill_the_samples_are_those_of_an_uninterrupted_run(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    stored = 0
    while stored < 100_000 and process.poll() is None:
        time.sleep(0.02)
        stored = sum(file.stat().st_size for file in (tmp_path / "killed").rglob("text/*.jsonl"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    models, chosen, protocol = {"base": zoo_path("base")}, tasks(60), PROTOCOL | {"n": 32}
    resumed = run(tmp_path / "killed", models, chosen, protocol=protocol)
    whole = run(tmp_path / "whole", models, chosen, protocol=protocol)
    assert whole["generated"] == 3840
    assert 100 < resumed["reused"] < 3840
    assert resumed["reused"] + resumed["generated"] == 3840
    samples = [lines(tmp_path / name / "run" / "samples" / "base.jsonl") for name in ("killed", "whole")]
    assert samples[0] == samples[1]
    assert resumed["scores"] == whole["scores"]


@pytest.mark.slow
def test_rollouts_are_what_alignment_reads(tmp_path):
    from rotrl.align.data import read_rollouts

    models = {name: zoo_path(name) for name in ("math", "code")}
    prompts = {"math": math_task(split="train", limit=10), "code": code_task(split="train", limit=10)}
    weights = {name: open_checkpoint(path).sha256 for name, path in models.items()}
    options = {"weights": weights, "n": 3, "sampling": PROTOCOL, "engine": ENGINE, "cache": tmp_path, "seed": 1}
    seen = []
    files = rollouts(models, prompts, **options, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60)
    rows = lines(files["math"])
    assert [(row["problem_id"], row["sample_index"]) for row in rows] == [
        (problem.id, i) for problem in prompts["math"].problems for i in range(3)
    ]
    assert len(read_rollouts(files["math"])) == 30
    ends = [row["completion_ids"][-1] for row in rows]
    assert ends.count(json.loads((zoo_path("math") / "config.json").read_text())["eos_token_id"]) >= 25
    before = {name: (file, file.stat().st_mtime_ns, file.read_bytes()) for name, file in files.items()}
    again = rollouts(models, prompts, **options)
    assert {name: (file, file.stat().st_mtime_ns, file.read_bytes()) for name, file in again.items()} == before
    assert rollouts(models, prompts, **options | {"seed": 2})["math"] != files["math"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"protocol": PROTOCOL | {"ks": [1, 8]}}, ConfigError, r"protocol.ks: pass@8 .* n=4"),
        ({"protocol": PROTOCOL | {"n": {"other": 4}}}, ConfigError, "protocol.n: found None for task tiny_math"),
        ({"protocol": {"n": 1, "temperature": 1}}, ConfigError, "protocol: top_p, top_k, max_tokens missing"),
        ({"protocol": PROTOCOL | {"max_tokens": 300}}, EvaluationError, "context of 256 tokens"),
        ({"engine": ENGINE | {"max_model_len": 20}}, EvaluationError, "engine.max_model_len is 20"),
        ({"sandbox": {"minimun": "landlock"}}, ConfigError, "sandbox: unknown key minimun"),
    ],
)
def test_what_cannot_be_done_is_refused_before_an_engine_starts(tmp_path, monkeypatch, changes, error, words):
    def forbidden(*_, **__):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", forbidden)
    with pytest.raises(error, match=words):
        run(tmp_path, {"base": zoo_path("base")}, tasks(), **changes)
    assert not (tmp_path / "run").exists()


def test_the_key_of_a_sample_is_all_that_it_follows_from():
    from rotrl.evaluate.sampling import Sampling

    def digest(seed=0, engine=ENGINE, **sampling) -> str:
        return Sampler(Sampling.of(PROTOCOL | sampling), engine, Path("a"), Path("b"), seed).digest

    known = {
        digest(),
        digest(seed=1),
        digest(temperature=0.9),
        digest(max_tokens=47),
        digest(stop=["x"]),
        digest(engine=ENGINE | {"dtype": "bfloat16"}),
    }
    assert len(known) == 6
    assert digest(engine=ENGINE | {"threads": 2, "max_num_seqs": 8}) == digest()
