"""Verdicts on planted gains; intervals that hold draws and problems."""

import json
import re

import numpy as np
import pytest

from rotrl.evidence.gain import Gains, Part, beside_controls, judge_expert, overall, worst

PROBLEMS = 60


def gains(spread=0.02, seed=0, problems=PROBLEMS, **closed):
    """Parts that close these shares of a gap of 1 nat a token on average, with noise of its own on every problem.

    The draws of one kind share their noise, as they share their problems.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 20, problems).astype(float)

    def part(share, energy, kind="base"):
        noise = np.random.default_rng([seed, *kind.encode()]).standard_normal(problems)
        kl = (1 - share + spread * noise) * tokens
        return Part(energy, kl.tolist(), tokens.tolist(), 1 - energy)

    parts = {"base": part(0, 0.0), "matrices": Part(1.0, [0.0] * problems, tokens.tolist(), 0.0)}
    parts |= {name: part(share, 0.25, name.rpartition("_")[0] or name) for name, share in closed.items()}
    return Gains(parts, samples=2 * problems, resamples=500, seed=0, accuracy={"tangent": {"accuracy": 0.7}})


def judged(**closed):
    """Directions of the same planes gain what other parts of the update gain, unless told."""
    planes = {name.replace("part", "plane"): share for name, share in closed.items() if name.startswith("part")}
    return judge_expert("math", gains(**(planes | closed)), tight=0.1)


def test_supported_refuted_undecided():
    base = {"random_0": 0.1, "random_1": 0.12, "scaled": 0.6}
    assert judged(tangent=0.5, part_0=0.3, part_1=0.31, **base)["verdict"] == "supported"
    assert judged(tangent=0.5, part_0=0.51, part_1=0.49, **base)["verdict"] == "refuted"
    assert judged(tangent=0.5, part_0=0.7, part_1=0.71, **base)["verdict"] == "refuted"
    assert judged(tangent=0.5, part_0=0.3, part_1=0.31, plane_0=0.5, plane_1=0.51, **base)["verdict"] == "refuted"
    open_ = judged(tangent=0.5, part_0=0.43, part_1=0.43, spread=0.6, **base)
    assert open_["verdict"] == "undecided"
    assert open_["decided_by"] > 2 * PROBLEMS
    assert f"about {open_['decided_by']} samples would decide" in open_["words"]


def test_the_number_of_samples_that_decides_does_decide():
    """At the number that is told the half-width is the distance to the nearer decision."""
    closed = {"tangent": 0.5, "part_0": 0.47, "part_1": 0.47, "random_0": 0.1, "random_1": 0.1, "scaled": 0.6}

    def against_parts(problems):
        found = judged(**closed, spread=0.2, problems=problems)
        return next(c for c in found["comparisons"] if c["against"].startswith("random parts"))

    few = against_parts(100)
    assert few["verdict"] == "undecided"
    many = against_parts(few["decided_by"] // 2)
    gap = max(few["ratio"] - 1, 1.1 - few["ratio"])
    assert (many["high"] - many["low"]) / 2 == pytest.approx(gap, rel=0.25)


def test_where_the_draws_disagree_more_samples_do_not_help():
    draws = {f"part_{i}": share for i, share in enumerate((0.2, 0.45, 0.7))}
    found = judged(tangent=0.5, random_0=0.1, random_1=0.1, scaled=0.6, **draws)
    assert found["verdict"] == "undecided"
    assert found["decided_by"] is None
    assert "more draws of the controls are needed first" in found["words"]


def test_directions_that_gain_nothing_are_beaten_without_a_ratio():
    found = judged(tangent=0.5, part_0=0.2, part_1=0.2, random_0=-0.1, random_1=-0.12, scaled=0.6)
    assert found["verdict"] == "supported"
    assert found["comparisons"][0]["ratio"] is None
    json.dumps(found, allow_nan=False)
    assert re.search(r"random rotations -1[0-2]%,", found["words"])


def test_draws_widen_the_interval():
    same = gains(tangent=0.5, part_0=0.4, part_1=0.4, part_2=0.4, spread=0.0)
    apart = gains(tangent=0.5, part_0=0.2, part_1=0.4, part_2=0.6, spread=0.0)
    spread = [np.ptp(each.score("part")[1:]) for each in (same, apart)]
    assert spread[0] < 1e-9
    assert spread[1] == pytest.approx(0.4)
    assert same.score("part")[0] == pytest.approx(apart.score("part")[0])


def test_intervals_cover_the_mean():
    hits = 0
    for seed in range(100):
        score = gains(tangent=0.5, spread=0.5, seed=seed).score("tangent")
        low, high = np.quantile(score[1:], [0.025, 0.975])
        hits += low <= 0.5 <= high
    assert hits >= 85


def test_rows_have_the_base_at_0_and_the_whole_at_1():
    rows = {row["part"]: row for row in gains(tangent=0.5, random_0=0.1, random_1=0.1).rows()}
    assert set(rows) == {"base", "matrices", "tangent", "random"}
    assert rows["base"]["score"] == 0
    assert rows["matrices"]["score"] == 1
    assert rows["tangent"]["low"] < rows["tangent"]["score"] < rows["tangent"]["high"]
    assert rows["tangent"]["gain_per_energy"] == pytest.approx(0.5 / 0.25, rel=0.1)
    low, gain, high = (rows["tangent"][key] for key in ("gain_low", "gain_per_energy", "gain_high"))
    assert low < gain < high
    assert [rows["base"][key] for key in ("gain_low", "gain_per_energy", "gain_high")] == [None] * 3
    assert rows["tangent"]["taken"] == 0.75
    assert rows["tangent"]["accuracy"] == 0.7
    assert "accuracy" not in rows["random"]


def test_a_restoration_is_paired_with_its_control():
    rows = {row["part"]: row for row in gains(**{"ranks_0-20": 0.5, "ranks_0-20_control": 0.8}).rows()}
    row = rows["ranks_0-20"]
    assert row["control"] == "ranks_0-20_control"
    assert row["difference"] == pytest.approx(row["score"] - rows["ranks_0-20_control"]["score"])
    assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert "control" not in rows["matrices"]


def test_swaps_and_restorations_are_told_beside_their_controls():
    closed = {"vectors": 0.9, "vectors_control": 0.95, "ranks_0-20": 0.5, "ranks_0-20_control": 0.8}
    swapped, restored = beside_controls("math", gains(spread=0.0, **closed))
    assert "the expert's vectors with the base's values 90.0%, control 95.0% (-5.0 points, -5.0 to -5.0)" in swapped
    assert "ranks 0-20 % 50.0%, control 80.0% (-30.0 points" in restored
    assert beside_controls("math", gains()) == []


def test_experts_that_differ_leave_it_open_and_the_scaled_update_is_told():
    good = judged(tangent=0.5, part_0=0.2, part_1=0.2, random_0=0.1, random_1=0.1, scaled=0.8)
    bad = judged(tangent=0.5, part_0=0.7, part_1=0.7, random_0=0.1, random_1=0.1, scaled=0.8)
    assert overall({"a": good, "b": bad})[0] == "undecided"
    verdict, sentences = overall({"a": good})
    assert verdict == "supported"
    assert sentences[1].startswith("Yet the whole update scaled to that energy gains more")
    assert worst(["supported", "undecided"]) == "undecided"


def test_an_expert_that_is_the_base_has_no_verdict():
    tokens = [1.0] * PROBLEMS
    parts = {name: Part(float("nan"), [0.0] * PROBLEMS, tokens) for name in ("base", "tangent")}
    found = judge_expert("math", Gains(parts, samples=10, resamples=10, seed=0), 0.1)
    assert found["words"] == "math: its matrices do not differ from the base"
