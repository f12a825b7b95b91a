import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.report.standings import Interval, average, number, paired, standings, total
from rotrl.report.words import learned, merge_words


def value(record, model, task, metric="avg@8"):
    rows = [r for r in record["scores"] if (r["model"], r["task"], r["metric"]) == (model, task, metric)]
    return rows[0]["value"]


def test_rows_are_base_experts_and_merges_by_falling_mean(full):
    record, _ = full
    table = standings(record)
    assert table.tasks == ("tiny_math", "tiny_code")
    assert [row.model for row in table.rows][:3] == ["base", "math", "code"]
    means = [row.mean.value for row in table.role("merge")]
    assert means == sorted(means, reverse=True)
    assert len(means) == 10


def test_mean_minimum_ceiling_and_best_agree_with_the_rows(full):
    record, _ = full
    table = standings(record)
    for row in table.rows:
        scores = [value(record, row.model, task) for task in table.tasks]
        assert row.mean.value == pytest.approx(np.mean(scores))
        assert row.minimum == min(scores)
    merges = table.role("merge")
    assert table.best_mean.mean.value == max(row.mean.value for row in merges)
    assert table.best_minimum.minimum == max(row.minimum for row in merges)
    top = [max(value(record, expert, task) for expert in ("math", "code")) for task in table.tasks]
    assert table.ceiling == pytest.approx(np.mean(top))


def test_paired_differences_have_the_sign_of_their_order(full):
    record, _ = full
    table = standings(record)
    forward = paired("ties", "code", record, table.tasks)
    backward = paired("code", "ties", record, table.tasks)
    assert forward.value == pytest.approx(table.row("ties").mean.value - table.row("code").mean.value)
    assert (backward.value, backward.low, backward.high) == (-forward.value, -forward.high, -forward.low)
    assert paired("ties", "linear", record, table.tasks) is None


def test_a_row_for_the_mean_is_preferred_to_adding_in_quadrature(full):
    record, _ = full
    given_mean = {"a": "ties", "b": "code", "task": "mean", "difference": 0.2, "low": 0.1, "high": 0.3}
    record["comparisons"].append(given_mean)
    assert paired("ties", "code", record, ("tiny_math", "tiny_code")) == Interval(0.2, 0.1, 0.3)


def test_average_of_independent_estimates_covers_like_a_simulation():
    rng = np.random.default_rng(0)
    draws = rng.normal([0.2, 0.6], [0.02, 0.05], (200_000, 2)).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    found = average(
        [Interval(0.2, 0.2 - 1.96 * 0.02, 0.2 + 1.96 * 0.02), Interval(0.6, 0.6 - 1.96 * 0.05, 0.6 + 1.96 * 0.05)]
    )
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.2), st.floats(0, 0.2)), min_size=1, max_size=6))
def test_totals_stay_inside_the_sum_of_the_intervals(parts):
    intervals = [Interval(v, v - down, v + up) for v, down, up in parts]
    found = total(intervals)
    assert found.low >= sum(i.low for i in intervals) - 1e-9
    assert found.high <= sum(i.high for i in intervals) + 1e-9


def test_a_model_without_one_task_has_no_mean_and_cannot_win(full):
    record, _ = full
    record["scores"] = [r for r in record["scores"] if (r["model"], r["task"]) != ("learned", "tiny_code")]
    table = standings(record)
    assert table.row("learned").mean is None
    assert table.best_mean.model != "learned"
    assert table.rows[-1].model == "learned"


def test_cells_may_be_text_as_csv_gives_them(full):
    record, _ = full
    as_text = {**record, "scores": [{k: "" if v is None else str(v) for k, v in r.items()} for r in record["scores"]]}
    assert standings(as_text).best_mean.model == standings(record).best_mean.model
    assert number("") is number("nan") is number(None) is None


def test_rotations_are_told_from_other_merges_by_their_method(full):
    record, _ = full
    table = standings(record)
    rotations = {row.model for row in table.rows if row.rotation}
    assert rotations == {"learned", "orthomerge", "geodesic", "split_task_arithmetic"}


def narrow(record, difference):
    """The record with every paired difference replaced."""
    rows = [
        {**r, "difference": difference, "low": difference - 0.02, "high": difference + 0.02}
        for r in record["comparisons"]
    ]
    return {**record, "comparisons": rows}


def test_a_null_result_is_said_as_one(full):
    record, _ = full
    words = " ".join(merge_words(standings(narrow(record, 0.004)), narrow(record, 0.004)))
    assert "No merge can be told from the best single expert" in words
    assert "This is a null result." in words
    assert "a null result, rotations show no gain" in words


def test_a_loss_and_a_gain_are_said_as_such(full):
    record, _ = full
    assert "No merge reaches" in " ".join(merge_words(standings(narrow(record, -0.1)), narrow(record, -0.1)))
    gain = " ".join(merge_words(standings(record), record))
    assert "learned beats the best single expert" in gain
    assert "null result" not in gain
    assert "10 merges were tried" in gain


def test_without_a_paired_row_the_difference_of_merges_says_so(full):
    record, _ = full
    record["comparisons"] = [row for row in record["comparisons"] if row["b"] != "tsv_m"]
    assert "not paired" in " ".join(merge_words(standings(record), record))


def test_a_record_without_scores_has_no_rows(merge_only):
    record, _ = merge_only
    table = standings(record)
    assert table.rows == ()
    assert table.best_mean is table.ceiling is None
    assert merge_words(table, record) == []


def test_a_learned_merge_that_wins_is_not_taken_for_evidence_of_rotations(full):
    record, _ = full
    words = " ".join(merge_words(standings(record), record))
    assert "The best merge by rotation, learned, differs from the best other merge, tsv_m" in words
    assert "the difference is no evidence for rotations" in words


def test_a_merge_of_rotations_that_files_give_has_learned_if_they_have(full):
    record, _ = full
    for sampled in (True, False):
        record["merges"]["orthomerge"]["sampled"] = sampled
        assert learned("orthomerge", record) is sampled
    assert learned("learned", record)
