"""Experiment B on the tiny pair: KL against a direct computation, files, continuation, wrong settings."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rotrl.align.data import read_rollouts
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.errors import ConfigError
from rotrl.evidence import divergence
from rotrl.evidence.divergence import Divergence, load_model
from rotrl.evidence.function import COLUMNS, function
from rotrl.evidence.published import published
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


def test_every_variant_is_scored_as_a_checkpoint_and_removed(models, rollouts, tmp_path):
    base, expert = models[0], models[1]["math"]
    seen = {}

    def score(name, part, folder, sha256):
        """What a variant is on disk: its distance from the base and from the expert."""
        found = open_checkpoint(folder)
        assert found.sha256 == sha256
        assert all(info.dtype == torch.float32 for info in found.tensors.values())
        assert (folder / "tokenizer.json").is_file()
        seen[part] = folder
        far = [
            sum(float((found.read(key).double() - model.read(key).double()).square().sum()) for key in found.tensors)
            for model in (base, expert)
        ]
        return {"accuracy": far[0], "accuracy_low": far[0], "accuracy_high": far[0], "to_expert": far[1]}

    function(*models, tmp_path, rollouts=rollouts, accuracy=True, score=score, **OPTIONS)
    rows = {row["part"]: row for row in table(tmp_path)}
    assert not any(folder.exists() for folder in seen.values())
    assert set(seen) >= {"base", "matrices", "non_matrix", "tangent", "random_0", "update_0.5"}
    assert "random_1" not in seen
    assert float(rows["base"]["accuracy"]) == 0
    assert float(rows["matrices"]["to_expert"]) == pytest.approx(0, abs=1e-12)
    whole = float(rows["matrices"]["accuracy"])
    for part in ("tangent", "complement", "random", "part", "plane", "vectors", "values", "update_0.5"):
        assert float(rows[part]["accuracy"]) == pytest.approx(whole * float(rows[part]["energy"]), rel=0.05), part
        if part not in ("random", "part", "plane"):  # of these the first draw is scored
            assert float(rows[part]["to_expert"]) == pytest.approx(whole * float(rows[part]["taken"]), rel=1e-3), part


def test_a_stage_killed_while_it_scores_goes_on(models, rollouts, tmp_path):
    calls = []

    def killed(name, part, folder, sha256):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"accuracy": float(len(sha256))}

    options = {"rollouts": rollouts, "accuracy": True, "swaps": False, **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        function(*models, tmp_path, score=killed, **options)
    assert not (tmp_path / "variant").exists()
    again = []
    function(*models, tmp_path, score=lambda name, part, *_: again.append(part) or {"accuracy": 1.0}, **options)
    assert calls[2] == again[0]
    assert not set(calls[:2]) & set(again)


def test_restorations_stand_beside_as_much_energy_taken_out(models, rollouts, tmp_path):
    spans = {"ranks": [[0, 0.2]], "layers": [[0, 0.25], [0.75, 1]]}
    function(*models, tmp_path, rollouts=rollouts, restore=spans, swaps=False, **OPTIONS)
    rows = {row["part"]: row for row in table(tmp_path)}
    for part in ("ranks_0-20", "layers_0-25", "layers_75-100"):
        row, control = rows[part], rows[f"{part}_control"]
        assert row["control"] == f"{part}_control"
        assert float(row["taken"]) == pytest.approx(float(control["taken"]), rel=0.02)
        assert float(row["energy"]) == pytest.approx(float(control["energy"]), abs=0.05)
        assert float(row["difference"]) == pytest.approx(float(row["score"]) - float(control["score"]), abs=1e-6)
    assert 0.1 < float(rows["layers_0-25"]["taken"]) < 0.6  # one layer of three


def test_published_numbers_stand_beside_the_models_that_they_are_of():
    base, expert = "DeepSeek-R1-Distill-Qwen-1.5B", "Nemotron-Research-Reasoning-Qwen-1.5B"
    (told,) = published(Path("models", base), Path(f"hub/models--nvidia--{expert}/snapshots/0123"))
    assert "arXiv 2607.19331" in told
    assert "aime24 base 30.90 %, expert 51.56 %, its singular vectors with the base's values 48.96 %" in told
    assert published(Path("models", base), Path("models/other")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy": True}, "accuracy: no score is given"),
        ({"restore": {"ranks": [[0.5]]}}, r"restore.ranks: \[0.5\] is no span"),
        ({"side": "both"}, "side is 'both', one of small, left, right is expected"),
        ({"draws": 0}, "draws is 0, it must be 1 or more"),
        ({"tight": 0}, "tight is 0, it must be above 0"),
        ({"rollouts": None}, "rollouts of math are missing"),
    ],
)
def test_wrong_settings_are_one_line(models, rollouts, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        function(*models, tmp_path / "out", **({"rollouts": rollouts} | options))
    assert not (tmp_path / "out").exists()
