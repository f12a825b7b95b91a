"""Verdicts on planted gains; intervals that hold draws and problems."""

import json
import re

import numpy as np
import pytest

from rotrl.evidence.gain import Gains, Part, judge_expert, overall, worst

PROBLEMS = 60


def gains(spread=0.02, seed=0, **closed):
    """Parts that close these shares of a gap of 1 nat a token on average, with noise of its own on every problem."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 20, PROBLEMS).astype(float)

    def part(share, energy):
        kl = (1 - share + spread * rng.standard_normal(PROBLEMS)) * tokens
        return Part(energy, kl.tolist(), tokens.tolist())

    parts = {"base": part(0, 0.0), "matrices": Part(1.0, [0.0] * PROBLEMS, tokens.tolist())}
    parts |= {name: part(share, 0.25) for name, share in closed.items()}
    return Gains(parts, samples=2 * PROBLEMS, resamples=500, seed=0)


def judged(**closed):
    return judge_expert("math", gains(**closed), tight=0.1)


def test_supported_refuted_undecided():
    base = {"random_0": 0.1, "random_1": 0.12, "scaled": 0.6}
    assert judged(tangent=0.5, part_0=0.3, part_1=0.31, **base)["verdict"] == "supported"
    assert judged(tangent=0.5, part_0=0.51, part_1=0.49, **base)["verdict"] == "refuted"
    assert judged(tangent=0.5, part_0=0.7, part_1=0.71, **base)["verdict"] == "refuted"
    open_ = judged(tangent=0.5, part_0=0.43, part_1=0.43, spread=0.6, **base)
    assert open_["verdict"] == "undecided"
    assert open_["decided_by"] > 2 * PROBLEMS
    assert f"about {open_['decided_by']} samples would decide" in open_["words"]


def test_the_number_of_samples_that_decides_does_decide():
    """The half-width falls with the root of the samples: at the number told it has the distance to the threshold."""
    found = judged(tangent=0.5, part_0=0.43, part_1=0.43, random_0=0.1, random_1=0.1, scaled=0.6, spread=0.6)
    each = next(c for c in found["comparisons"] if c["against"].startswith("random parts"))
    half = (each["high"] - each["low"]) / 2
    reached = half * (2 * PROBLEMS / each["decided_by"]) ** 0.5
    assert reached == pytest.approx(max(each["ratio"] - 1, 1.1 - each["ratio"]), rel=0.02)


def test_directions_that_gain_nothing_are_beaten_without_a_ratio():
    found = judged(tangent=0.5, part_0=0.2, part_1=0.2, random_0=-0.1, random_1=-0.12, scaled=0.6)
    assert found["verdict"] == "supported"
    assert found["comparisons"][0]["ratio"] is None
    json.dumps(found, allow_nan=False)
    assert re.search(r"random rotations of that energy -1[0-2]%,", found["words"])


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
    assert rows["base"]["gain_per_energy"] is None


def test_experts_that_differ_leave_it_open_and_the_scaled_update_is_told():
    good = judged(tangent=0.5, part_0=0.2, part_1=0.2, random_0=0.1, random_1=0.1, scaled=0.8)
    bad = judged(tangent=0.5, part_0=0.7, part_1=0.7, random_0=0.1, random_1=0.1, scaled=0.8)
    assert overall({"a": good, "b": bad})[0] == "undecided"
    verdict, words = overall({"a": good})
    assert verdict == "supported"
    assert "Yet the whole update scaled to that energy gains more" in words
    assert worst(["supported", "undecided"]) == "undecided"


def test_an_expert_that_is_the_base_has_no_verdict():
    tokens = [1.0] * PROBLEMS
    parts = {name: Part(float("nan"), [0.0] * PROBLEMS, tokens) for name in ("base", "tangent")}
    found = judge_expert("math", Gains(parts, samples=10, resamples=10, seed=0), 0.1)
    assert found["words"] == "math: its matrices do not differ from the base"
