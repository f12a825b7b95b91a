"""From graded samples to the rows of scores.csv and comparisons.csv, and what raises an alarm."""

import csv
import io

import numpy as np
import pytest

from rotrl.evaluate import graded, scores
from rotrl.evaluate.majority import RIGHT, SILENT, UNKNOWN, maj_at_k
from rotrl.evaluate.output import cell, write_csv, write_jsonl
from rotrl.evaluate.prompts import Prompt
from rotrl.evaluate.samples import Wanted
from rotrl.evaluate.statistics import avg_at_n, holm, paired_difference, pass_at_k
from rotrl.evaluate.task import Problem, Task
from rotrl.evaluate.verdict import Verdict

TASK = Task("sums", (Problem("a", "1?", answer="1"), Problem("b", "2?", answer="2")), "math")
PROMPTS = {("sums", name): Prompt((1, 2), f"sha-{name}", thinks) for name, thinks in (("a", False), ("b", True))}


def rows(verdicts: list[str], reasons: list[str] | None = None, texts: list[str] | None = None) -> list[dict]:
    """Samples a0, a1, b0, b1."""
    found = []
    for i, word in enumerate(verdicts):
        name = "ab"[i // 2]
        row = {
            "completion": (texts or ["x</think>"] * 4)[i],
            "finish_reason": (reasons or ["stop"] * 4)[i],
            "tokens": 3,
        }
        verdict = graded.ENGINE_ERROR if word == "engine error" else Verdict.of(word, "math:integer")
        wanted = Wanted("sums", name, i % 2, PROMPTS["sums", name])
        found.append(graded.graded_row(wanted, row, verdict, run_seed=0, weights="w"))
    return found


def test_the_row_is_that_of_the_contract():
    assert ", ".join(rows(["accepted"])[0]) == (
        "task, problem_id, sample_index, seed, prompt_sha256, completion, finish_reason, tokens, verdict, grader, "
        "published, model_sha256"
    )


def tally(found: list[dict], task: Task = TASK) -> graded.Tally:
    counted = graded.Tally.of(task, 2)
    for i, row in enumerate(found):
        counted.add(i // 2, row, thinks=PROMPTS["sums", row["problem_id"]].thinks)
    return counted


def test_matrices_hold_what_could_be_graded():
    matrix = tally(rows(["accepted", "wrong answer", "grader error", "engine error"])).correct
    assert np.array_equal(matrix, [[1, 0], [np.nan, np.nan]], equal_nan=True)
    assert tally(rows(["time limit", "no code"] * 2)).correct.sum() == 0


def test_votes_are_answers_by_their_text_and_right_ones_are_one_answer():
    texts = [r"\boxed{1/2}", r"so \boxed{ 0.5 }", "nothing", r"\boxed{x + 1}"]
    found = rows(["accepted", "accepted", "no answer", "wrong answer"], texts=texts)
    assert tally(found).votes.tolist() == [[RIGHT, RIGHT], [SILENT, 1]]
    texts = [r"\boxed{ 3}", r"\boxed{3 }", r"\boxed{4}", r"\boxed{3}"]
    found = rows(["wrong answer", "wrong answer", "grader timeout", "wrong answer"], texts=texts)
    assert tally(found).votes.tolist() == [[1, 1], [UNKNOWN, 1]]
    assert tally(found, Task("sums", TASK.problems, "code")).votes is None


def test_cut_off_and_unclosed_thoughts_are_counted():
    found = rows(["accepted"] * 4, ["length", "stop", "stop", "stop"], ["5", "<think>5", "5", "5</think>5"])
    counted = tally(found)
    assert (counted.truncated, counted.ended, counted.unfinished) == (1, 4, 2)
    assert (counted.tokens, counted.counted) == (12, 4)


def test_alarms_are_sentences_about_a_model_and_a_task():
    found = rows(["grader timeout", "accepted", "engine error", "engine error"], ["length"] * 4)
    said = graded.alarms("merge", {"sums": tally(found)})
    assert said == [
        "merge, sums: 4 of 4 samples were cut off at the token limit; raise protocol.max_tokens",
        "merge, sums: 1 samples are left out (grader timeout)",
        "merge, sums: the engine refused problem 'b' or died of it; left out",
    ]
    assert graded.alarms("merge", {"sums": tally(rows(["accepted"] * 4))}) == []


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    rates = {"base": (0.3, 0.5), "math": (0.8, 0.5), "code": (0.3, 0.95), "merge": (0.7, 0.85)}
    skill = rng.normal(0, 0.1, 200)
    return {
        name: {
            task: (rng.random((200, n)) < np.clip(rate + skill, 0, 1)[:, None]).astype(float)
            for task, rate, n in zip(("m", "c"), pair, (4, 2), strict=True)
        }
        for name, pair in rates.items()
    }


ROLES = {"base": "base", "math": "expert", "code": "expert", "merge": "merge"}


def tallies(matrices, **counts):
    """What graded samples would have left: matrices, and counts that are the same for every task."""
    known = {"ended": 1, "counted": 2, "tokens": 7} | counts
    return {
        task: graded.Tally(matrix, np.full(matrix.shape, np.nan), None, **known) for task, matrix in matrices.items()
    }


def score(matrices, **changes):
    return scores.score_rows("base", tallies(matrices), **{"protocol": "tiny", "ks": [1, 4], "seed": 0} | changes)


def test_scores_have_the_columns_and_metrics(world):
    counted = tallies(world["base"])
    counted["m"].truncated, counted["c"].truncated = 3, 4
    found = scores.score_rows("base", counted, protocol="tiny", ks=[1, 4], seed=0)
    assert all(tuple(row) == scores.SCORES for row in found)
    assert [(row["task"], row["metric"]) for row in found] == [
        ("m", "avg@4"),
        ("m", "pass@1"),
        ("m", "pass@4"),
        ("c", "avg@2"),
        ("c", "pass@1"),
        ("mean", "avg@4/2"),
    ]
    assert found[2]["value"] == pytest.approx(pass_at_k(world["base"]["m"], 4).mean(), abs=1e-6)
    assert found[-1]["value"] == pytest.approx((found[0]["value"] + found[3]["value"]) / 2, abs=1e-6)
    assert [row["truncated"] for row in found] == [3, 3, 3, 4, 4, 7]
    assert (found[0]["problems"], found[0]["samples"], found[-1]["samples"]) == (200, 800, 1200)
    assert [row["tokens"] for row in found] == [3.5] * 6
    for row in found:
        assert row["low"] < row["sampling_low"] < row["value"] < row["sampling_high"] < row["high"]


def test_the_published_score_and_where_the_graders_differ_stand_beside_the_strict_one(world):
    counted = tallies(world["base"])
    counted["m"].published = np.where(np.arange(4) < 1, 0.0, world["base"]["m"])
    counted["m"].published[0, 1] = np.nan
    found = {
        (row["task"], row["metric"]): row for row in scores.score_rows("base", counted, protocol="p", ks=[2], seed=0)
    }
    shown = found["m", "avg@4"]
    assert shown["value"] == pytest.approx(world["base"]["m"].mean(), abs=1e-6)
    assert shown["score_published"] == pytest.approx(np.nanmean(avg_at_n(counted["m"].published)), abs=1e-6)
    assert shown["disagreement"] == pytest.approx(world["base"]["m"][:, 0].sum() / 799, abs=1e-6)
    assert found["m", "pass@2"]["score_published"] > shown["score_published"]
    assert (found["c", "avg@2"]["score_published"], found["c", "avg@2"]["disagreement"]) == (None, None)
    assert (
        found["mean", "avg@4/2"]["score_published"] is None
    )  # a mean over tasks of which one has none would be another's


def test_problems_that_could_not_be_graded_are_left_out_of_the_score(world):
    matrix = world["base"]["m"].copy()
    matrix[0], matrix[1, 0] = np.nan, np.nan
    found = score({"m": matrix})
    assert [(row["problems"], row["samples"]) for row in found] == [(199, 795), (199, 795), (198, 792)]


def test_one_sample_has_no_sampling_interval(world):
    (row, *_) = score({"m": world["base"]["m"][:, :1]}, ks=[1])
    assert (row["metric"], row["sampling_low"], row["sampling_high"]) == ("avg@1", None, None)


def test_comparisons_are_experts_and_merges_against_base_and_merges_against_experts(world):
    found = scores.comparison_rows(world, ROLES, seed=0)
    assert all(tuple(row) == scores.COMPARISONS for row in found)
    pairs = list(dict.fromkeys((row["a"], row["b"]) for row in found))
    assert pairs == [
        ("math", "base"),
        ("code", "base"),
        ("code", "math"),
        ("merge", "base"),
        ("merge", "math"),
        ("merge", "code"),
    ]
    assert [row["task"] for row in found] == ["m", "c", "mean"] * 6
    first = paired_difference([avg_at_n(world["math"]["m"])], [avg_at_n(world["base"]["m"])])
    assert found[0]["difference"] == pytest.approx(first.difference, abs=1e-6)
    assert (found[0]["wins"], found[0]["ties"], found[0]["losses"]) == (first.wins, first.ties, first.losses)


def test_retention_stands_where_a_merge_meets_an_expert_that_gained(world):
    found = {(row["a"], row["b"], row["task"]): row for row in scores.comparison_rows(world, ROLES, seed=0)}
    kept = {key for key, row in found.items() if row["retention"] is not None}
    assert {("merge", "math", "m"), ("merge", "code", "c"), ("merge", "math", "mean")} <= kept
    assert not kept & {("merge", "math", "c"), ("merge", "code", "m"), ("merge", "base", "m"), ("math", "base", "m")}
    row = found["merge", "math", "m"]
    assert row["retention_low"] < row["retention"] < row["retention_high"]
    assert row["retention"] == pytest.approx(0.8, abs=0.1)


def test_a_comparison_says_whether_models_are_the_same_for_a_stated_margin(world):
    same = {"base": world["base"], "merge": {task: np.roll(m, 1, axis=1) for task, m in world["base"].items()}}
    for row in scores.comparison_rows(same, ROLES, seed=0, margin=0.03):
        assert (row["difference"], row["margin"]) == (0, 0.03)
        assert row["p_equivalence"] < 0.05 < row["p_value"]
    far = scores.comparison_rows(world, ROLES, seed=0)
    assert {row["margin"] for row in far} == {scores.MARGIN}
    assert all(row["p_equivalence"] > 0.95 for row in far if row["low"] > 0.02)


def test_p_values_are_adjusted_for_the_whole_table(world):
    found = scores.comparison_rows(world, ROLES, seed=0)
    assert [row["p_holm"] for row in found] == pytest.approx(holm([row["p_value"] for row in found]), abs=1e-5)
    assert min(row["p_holm"] for row in found) < 1e-4  # a resolution of 1 / 10,001 would end at 18 times that


def test_the_tasks_that_select_are_no_part_of_the_mean(world):
    found = score(world["base"], select=["m"])
    assert [row["task"] for row in found] == ["m"] * 3 + ["c"] * 2
    three = {"m": world["base"]["m"], "c": world["base"]["c"], "d": world["math"]["c"]}
    mean = score(three, select=["m"])[-1]
    assert mean["task"] == "mean"
    assert mean["value"] == pytest.approx((three["c"].mean() + three["d"].mean()) / 2, abs=1e-6)
    assert "mean" not in {row["task"] for row in scores.comparison_rows(world, ROLES, seed=0, select=["m"])}


def test_math_has_majorities_and_code_has_none(world):
    counted = tallies(world["base"])
    counted["m"].votes = np.where(world["base"]["m"] == 1, RIGHT, 1).astype(int)
    found = scores.score_rows("base", counted, protocol="tiny", ks=[1, 4], seed=0)
    assert [row["metric"] for row in found if row["metric"].startswith("maj")] == ["maj@4"]
    row = next(row for row in found if row["metric"] == "maj@4")
    assert row["value"] == pytest.approx(maj_at_k(counted["m"].votes, 4).mean(), abs=1e-6)
    assert row["low"] < row["value"] < row["high"]
    assert row["sampling_low"] is None


def test_models_are_compared_on_the_tasks_that_both_have(world):
    some = {"base": world["base"], "math": {"m": world["math"]["m"]}}
    assert [row["task"] for row in scores.comparison_rows(some, ROLES, seed=0)] == ["m"]


def test_without_a_base_or_merges_there_is_nothing_to_compare(world):
    assert scores.comparison_rows({"math": world["math"]}, {"math": "expert"}, seed=0) == []


def test_csv_and_jsonl_appear_whole(tmp_path):
    write_csv(tmp_path / "a" / "t.csv", ("x", "y"), [{"x": "a,b", "y": None}, {"x": cell(np.nan), "y": cell(1 / 3)}])
    text = (tmp_path / "a" / "t.csv").read_text()
    assert list(csv.reader(io.StringIO(text))) == [["x", "y"], ["a,b", ""], ["", "0.333333"]]

    def broken():
        yield {"x": 1}
        raise RuntimeError

    write_jsonl(tmp_path / "t.jsonl", [{"x": 0}])
    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "t.jsonl", broken())
    assert (tmp_path / "t.jsonl").read_text() == '{"x": 0}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "t.jsonl"]
