"""Experiment B on the tiny pair: KL against a direct computation, files, continuation, wrong settings."""

import csv
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from rotrl.align.data import read_rollouts
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.errors import ConfigError
from rotrl.evidence import divergence
from rotrl.evidence.divergence import Divergence, load_model
from rotrl.evidence.function import COLUMNS, function
from rotrl.zoo import zoo_path

OPTIONS = {"draws": 2, "doses": [0.5], "bootstrap": 50}


@pytest.fixture(scope="module")
def models():
    return open_checkpoint(zoo_path("base")), {"math": open_checkpoint(zoo_path("math"))}


@pytest.fixture
def rollouts(tmp_path):
    draw = random.Random(0)
    lines = [
        {
            "prompt_ids": [draw.randrange(40) for _ in range(draw.randrange(3, 9))],
            "completion_ids": [draw.randrange(40) for _ in range(draw.randrange(1, 12))],
            "problem_id": f"p{i // 2}",
            "sample_index": i % 2,
        }
        for i in range(16)
    ]
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return {"math": path}


def table(folder):
    with (folder / "function.csv").open() as file:
        return list(csv.DictReader(file))


def test_kl_is_that_of_whole_sequences_in_float64(models, rollouts, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK", 100)
    samples = read_rollouts(rollouts["math"])
    measured = Divergence(models[1]["math"], samples, batch=3)
    found = measured.of(load_model(models[0]))
    expected = dict.fromkeys(measured.problems, 0.0)
    p, q = (AutoModelForCausalLM.from_pretrained(zoo_path(n), dtype=torch.float64) for n in ("math", "base"))
    for rollout in samples:
        ids = torch.tensor([rollout.prompt + rollout.completion])
        with torch.no_grad():
            log_p, log_q = (m(ids).logits[0, len(rollout.prompt) - 1 : -1].log_softmax(-1) for m in (p, q))
        expected[rollout.problem] += float((log_p.exp() * (log_p - log_q)).sum())
    assert found == pytest.approx(list(expected.values()), rel=1e-4)
    assert measured.tokens.sum() == sum(len(rollout.completion) for rollout in samples)
    assert measured.of(load_model(models[1]["math"])) == pytest.approx(0, abs=1e-6)


def test_every_part_is_measured_and_the_stage_continues(models, rollouts, tmp_path):
    seen = []
    whole = function(*models, tmp_path / "whole", rollouts=rollouts, progress=lambda *x: seen.append(x), **OPTIONS)
    rows = {row["part"]: row for row in table(tmp_path / "whole")}
    assert list(rows["base"]) == COLUMNS
    assert {"matrices", "non_matrix", "tangent", "complement", "rotation", "scaled", "random", "part"} <= set(rows)
    assert {"vectors", "vectors_control", "values", "values_control", "update_0.5", "rotation_0.5"} <= set(rows)
    assert float(rows["base"]["score"]) == 0
    assert float(rows["matrices"]["score"]) == pytest.approx(1)  # the experts of the tiny pair moved matrices alone
    assert float(rows["non_matrix"]["score"]) == pytest.approx(0, abs=1e-4)
    assert float(rows["tangent"]["energy"]) + float(rows["complement"]["energy"]) == pytest.approx(1)
    assert float(rows["update_0.5"]["energy"]) == pytest.approx(0.25)
    assert seen[-1][0] == seen[-1][1]
    json.dumps(whole, allow_nan=False)

    def killed(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function(*models, tmp_path / "out", rollouts=rollouts, progress=killed, **OPTIONS)
    kept = (tmp_path / "out" / "function.work.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 4
    assert function(*models, tmp_path / "out", rollouts=rollouts, **OPTIONS) == whole
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["function.csv"]


def test_fewer_problems_are_a_choice_of_the_seed(models, rollouts, tmp_path):
    found = function(*models, tmp_path, rollouts=rollouts, problems=3, swaps=False, **OPTIONS)
    assert found["experts"]["math"]["samples"] == 6
    assert not any(row["part"].startswith("vectors") for row in found["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "both"}, "side: 'both' is not small, left or right"),
        ({"draws": 0}, "draws: 0; at least one"),
        ({"tight": 0}, "tight: 0; give a width above 0"),
        ({"rollouts": None}, "rollouts of math are missing"),
    ],
)
def test_wrong_settings_are_one_line(models, rollouts, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        function(*models, tmp_path / "out", **({"rollouts": rollouts} | options))
    assert not (tmp_path / "out").exists()
