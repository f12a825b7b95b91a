"""maj@k against all subsets of the samples."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotrl.errors import EvaluationError
from rotrl.evaluate.majority import RIGHT, SILENT, UNKNOWN, answer_of, maj_at_k


def brute_force(votes: list[int], k: int) -> float:
    """Every subset of k samples votes; who shares the first place has a share of it."""
    shares = []
    for subset in combinations(votes, k):
        tally = Counter(vote for vote in subset if vote != SILENT)
        first = [vote for vote, count in tally.items() if count == max(tally.values())]
        shares.append((RIGHT in first) / max(len(first), 1))
    return float(np.mean(shares))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=10).flatmap(
        lambda v: st.tuples(st.just(v), st.integers(1, len(v)))
    )
)
def test_it_is_the_mean_over_all_subsets(case):
    votes, k = case
    assert maj_at_k(np.array([votes]), k)[0] == pytest.approx(brute_force(votes, k))


def test_the_right_answer_wins_with_a_plurality_and_shares_a_tie():
    assert maj_at_k(np.array([[RIGHT, RIGHT, 1, 2, 3, SILENT]]), 6) == pytest.approx([1.0])
    assert maj_at_k(np.array([[RIGHT, RIGHT, 1, 1]]), 4) == pytest.approx([0.5])
    assert maj_at_k(np.array([[RIGHT, 1, 1, 1]]), 1) == pytest.approx([0.25])
    assert maj_at_k(np.array([[SILENT] * 4]), 4) == pytest.approx([0.0])


def test_64_samples_with_many_answers():
    """Of k draws without replacement from the same votes, simulated: within three standard errors."""
    rng = np.random.default_rng(0)
    votes = np.concatenate([np.zeros(20, int), rng.integers(1, 25, 40), np.full(4, SILENT)])
    drawn = [brute_force(rng.permutation(votes)[:16].tolist(), 16) for _ in range(4000)]
    found = maj_at_k(votes[None], 16)[0]
    assert abs(found - np.mean(drawn)) < 3 * np.std(drawn) / np.sqrt(4000)


def test_what_was_not_graded_is_no_sample_and_k_stays_below_the_rest():
    votes = np.array([[RIGHT, UNKNOWN, 1, RIGHT], [UNKNOWN] * 4])
    found = maj_at_k(votes, 3)
    assert found[0] == pytest.approx(1.0)
    assert np.isnan(found[1])
    with pytest.raises(EvaluationError, match="maj@4 needs at least 4"):
        maj_at_k(votes, 4)


def test_an_answer_is_the_text_of_the_last_box():
    assert answer_of(r"\boxed{1} then \boxed{ $2 x$ }") == "2x"
    assert answer_of("none") is None
