"""Statistics against enumeration, closed forms, simulation and the counts of a published comparison."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import EvaluationError
from rotrl.evaluate import statistics as s


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.lists(st.booleans(), min_size=n, max_size=n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_k_subsets_with_a_success(case):
    row, k = case
    subsets = list(combinations(row, k))
    assert s.pass_at_k(np.array([row], float), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_leaves_out_what_was_not_graded_and_refuses_k_above_n():
    correct = np.array([[1, 0, np.nan], [0, 0, 0]])
    assert s.pass_at_k(correct, 2).tolist() == [1.0, 0.0]
    assert s.avg_at_n(correct).tolist() == [0.5, 0.0]
    with pytest.raises(EvaluationError, match="pass@3 needs at least 3"):
        s.pass_at_k(correct, 3)
    assert np.isnan(s.pass_at_k(np.array([[np.nan, np.nan]]), 1)).all()


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 1), (4, 3, 2), (6, 2, 3)])
def test_sampling_variance_is_that_of_all_outcomes(n, c, k):
    """Brute force over the 2^n outcomes of one problem at p = c / n."""
    p = c / n
    outcomes = np.array(list(product([0.0, 1.0], repeat=n)))
    chance = p ** outcomes.sum(1) * (1 - p) ** (n - outcomes.sum(1))
    values = s.pass_at_k(outcomes, k)
    variance = chance @ values**2 - (chance @ values) ** 2
    row = np.zeros((1, n))
    row[0, :c] = 1
    interval = s.sampling_interval([np.repeat(row, 50, axis=0)], k)
    half = 1.959964 * np.sqrt(variance * n / (n - 1) / 50)
    assert interval.value == pytest.approx(s.pass_at_k(row, k)[0])
    assert interval.high - interval.value == pytest.approx(min(half, 1 - interval.value), rel=1e-6)


def test_one_sample_a_problem_has_no_known_sampling_error():
    assert np.isnan(s.sampling_interval([np.array([[1.0], [0.0]])]).low)


@pytest.mark.parametrize(
    ("problems", "n", "a", "b"),
    [(30, 64, 0.6, 0.9), (30, 64, 0.6, 1.4), (60, 8, 0.3, 1.2), (500, 4, 4.5, 0.5), (300, 4, 4.0, 1.0)],
    ids=["aime .4", "aime .3", "hard", "math .9", "easy"],
)
def test_intervals_cover_the_truth_in_93_to_97_percent(problems, n, a, b):
    """1500 worlds: p ~ Beta(a, b) per problem. Problem-level intervals hold the mean of the Beta, sampling intervals
    the mean of the drawn p, paired intervals the mean difference to a model that is .1 better or worse by problem."""
    rng = np.random.default_rng(0)
    worlds, hits = 1500, np.zeros(3)
    for _ in range(worlds):
        p = rng.beta(a, b, size=problems)
        q = np.where(rng.random(problems) < 0.75, p + 0.1 * (1 - p), 0.9 * p)
        first, second = ((rng.random((problems, n)) < x[:, None]).astype(float) for x in (p, q))
        mean = s.avg_at_n(first)
        outer = s.problem_interval([mean], resamples=1000)
        inner = s.sampling_interval([first])
        paired = s.paired_difference([s.avg_at_n(second)], [mean], resamples=1000)
        expected = 0.75 * 0.1 * b / (a + b) - 0.25 * 0.1 * a / (a + b)
        hits += [
            outer.low <= a / (a + b) <= outer.high,
            inner.low <= p.mean() <= inner.high,
            paired.low <= expected <= paired.high,
        ]
    assert (hits / worlds >= 0.93).all(), hits / worlds
    assert (hits / worlds <= 0.97).all(), hits / worlds


def test_sign_flips_are_uniform_under_the_null_and_find_a_shift():
    rng = np.random.default_rng(1)
    p_values = [
        s.paired_difference([rng.normal(0, 0.2, 40)], [np.zeros(40)], resamples=500).p_value for _ in range(600)
    ]
    assert 0.03 < np.mean(np.array(p_values) < 0.05) < 0.07
    assert s.paired_difference([rng.normal(0.2, 0.2, 40)], [np.zeros(40)]).p_value < 0.001


def test_sign_flip_p_value_against_all_flips():
    delta = np.array([0.5, 0.25, -0.25, 1.0, 0.0, 0.75, 0.5, -0.125])
    flips = np.array(list(product([-1, 1], repeat=len(delta)))) @ delta
    exact = np.mean(np.abs(flips) >= abs(delta.sum()))
    found = s.paired_difference([delta], [np.zeros(8)], resamples=20_000)
    assert found.p_value == pytest.approx(exact, abs=0.004)
    assert (found.wins, found.ties, found.losses) == (5, 1, 2)


def test_equal_models_differ_by_nothing():
    same = np.array([0.2, 0.8, 1.0])
    assert s.paired_difference([same], [same]) == (0.0, 0.0, 0.0, 1.0, 0, 3, 0)


def test_all_right_is_bounded_by_the_number_of_problems():
    assert s.problem_interval([np.ones(300)]) == (1.0, pytest.approx(0.025 ** (1 / 300)), 1.0)
    assert s.problem_interval([np.zeros(30)]).high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_a_mean_over_tasks_weighs_tasks_alike_and_draws_within_them():
    rng = np.random.default_rng(2)
    small, large = rng.random(30), rng.random(300)
    both = s.problem_interval([small, large])
    assert both.value == pytest.approx((small.mean() + large.mean()) / 2)
    variance = (small.var() / 30 + large.var() / 300) / 4
    assert (both.high - both.low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=0.08)


def test_the_seed_determines_everything():
    x = np.random.default_rng(3).random(25)
    assert s.problem_interval([x], seed=5) == s.problem_interval([x], seed=5)
    assert s.problem_interval([x], seed=5) != s.problem_interval([x], seed=6)


def test_retention_only_where_the_expert_gained():
    rng = np.random.default_rng(4)
    base = rng.random(200) * 0.4
    expert, merge = base + 0.4, base + 0.3
    kept = s.retention([merge], [base], [expert])
    assert kept is not None
    assert kept == pytest.approx((0.75, 0.75, 0.75))
    assert s.retention([merge], [base], [base + rng.normal(0, 0.1, 200)]) is None
    assert s.retention([merge], [base], [base - 0.2]) is None


def test_retention_interval_by_the_delta_method():
    rng = np.random.default_rng(5)
    base, expert, merge = rng.random(400) * 0.3, 0.5 + rng.random(400) * 0.5, 0.3 + rng.random(400) * 0.5
    kept = s.retention([merge], [base], [expert])
    assert kept is not None
    ratio = (merge - base).mean() / (expert - base).mean()
    error = ((merge - base) - ratio * (expert - base)).std() / (expert - base).mean() / 20
    assert kept.value == pytest.approx(ratio)
    assert (kept.high - kept.low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([]) == []


def test_a_p_value_below_the_resolution_of_the_flips_is_a_bound_on_the_exact_one():
    """20 problems: all 2^20 flips are known, none of them but two is as extreme as equal signs."""
    delta = np.linspace(0.1, 1.0, 20)
    found = s.paired_difference([delta], [np.zeros(20)], resamples=500)
    assert 2 / 2**20 <= found.p_value < 1 / 501
    assert found.p_value == pytest.approx(2 * np.exp(-(delta.sum() ** 2) / (2 * (delta**2).sum())))
    two = s.paired_difference([delta, delta], [np.zeros(20), np.zeros(20)], resamples=500)
    assert two.p_value == pytest.approx(found.p_value**2 / 2)  # twice the evidence


def test_equivalence_is_two_one_sided_t_tests():
    from scipy.stats import ttest_1samp

    delta = np.random.default_rng(7).normal(0.004, 0.1, 400)
    upper = ttest_1samp(delta, 0.02, alternative="less").pvalue
    lower = ttest_1samp(delta, -0.02, alternative="greater").pvalue
    found = s.equivalence([delta], [np.zeros(400)], margin=0.02)
    assert found == pytest.approx(max(upper, lower))
    assert s.equivalence([np.zeros(400)], [delta], margin=0.02) == pytest.approx(found)
    assert s.equivalence([delta + 0.05], [np.zeros(400)], margin=0.02) == 1.0
    same = np.full(300, 0.5)
    assert s.equivalence([same], [same], margin=0.02) == pytest.approx(0.98**300)
    assert s.equivalence([same[:3]], [same[:3]], margin=0.02) > 0.9  # three equal problems prove nothing


def test_models_that_lie_a_margin_apart_are_rarely_called_equivalent():
    rng, worlds = np.random.default_rng(8), 2000
    called = [
        s.equivalence(
            [rng.normal(0.02, 0.08, 100), rng.normal(0.02, 0.05, 60)], [np.zeros(100), np.zeros(60)], margin=0.02
        )
        < 0.05
        for _ in range(worlds)
    ]
    assert 0.035 < np.mean(called) < 0.065


def test_a_task_without_any_graded_problem_is_an_error():
    with pytest.raises(EvaluationError, match="no problem that was graded"):
        s.problem_interval([np.array([np.nan])])


def matrix(successes: int, problems: int, n: int) -> np.ndarray:
    """A problem x sample matrix with that many successes in all."""
    cells = np.zeros(problems * n)
    cells[np.random.default_rng(0).permutation(problems * n)[:successes]] = 1
    return cells.reshape(problems, n)


# Two runs each of DeepScaleR-1.5B and DeepCoder-1.5B by one published harness: successes, problems, samples, the scores
# as they were printed, the mean of p (1 - p) over problems, and the z of the pooled difference.
PUBLISHED = {
    "AIME24": ((126, 120), (131, 128), 30, 10, (".4200", ".4000"), (".4367", ".4267"), 0.13, 1.0),
    "AIME25": ((77, 93), (91, 86), 30, 10, (".2567", ".3100"), (".3033", ".2867"), 0.13, 0.6),
    "MATH-500": ((425, 420), (422, 430), 500, 1, (".8500", ".8400"), (".8440", ".8600"), 0.05, 0.7),
    "LiveCodeBench": ((504, 501), (549, 582), 511, 3, (".3288", ".3268"), (".3581", ".3796"), 0.06, 6.6),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_comparison_is_noise_but_for_code(task):
    math, code, problems, n, printed_math, printed_code, within, z = PUBLISHED[task]
    for runs, printed in ((math, printed_math), (code, printed_code)):
        means = [s.avg_at_n(matrix(c, problems, n)).mean() for c in runs]
        assert [f"{mean:.4f}"[1:] for mean in means] == list(printed)
    difference = (sum(code) - sum(math)) / (2 * problems * n)
    error = s.difference_standard_error(problems, 2 * n, within=within, between=0)
    assert difference / error == pytest.approx(z, abs=0.06)
    assert (difference / error > 1.96) == (task == "LiveCodeBench")


def test_power_of_the_pooled_aime_sets():
    """3 points on 60 problems need n = 64; the error of one model on AIME's 30 is 4.8 to 6.6 points at n = 1."""
    assert s.smallest_visible_difference(60, 64) == pytest.approx(0.03, abs=0.001)
    assert s.smallest_visible_difference(60, 16) > 0.035
    low, high = (s.difference_standard_error(30, 1, within=w, between=0) / np.sqrt(2) for w in (0.07, 0.13))
    assert (low, high) == (pytest.approx(0.048, abs=0.001), pytest.approx(0.066, abs=0.001))


def test_power_by_simulation():
    rng, problems, n, found = np.random.default_rng(6), 60, 16, 0
    p = np.full(problems, 0.15)  # p (1 - p) = .1275
    difference = s.smallest_visible_difference(problems, n, within=0.1275 + 0.0125, between=0.0)
    for _ in range(400):
        a, b = ((rng.random((problems, n)) < x[:, None]).astype(float) for x in (p + difference, p))
        found += s.paired_difference([s.avg_at_n(a)], [s.avg_at_n(b)], resamples=500).low > 0
    assert 0.72 < found / 400 < 0.88
