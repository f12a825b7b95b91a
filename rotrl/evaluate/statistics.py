"""Scores, intervals and paired comparisons. The unit is the problem.

`correct` is the matrix (problems, samples) of 1 and 0, with NaN where a sample is absent or could not be graded.
`strata` is a list with the values per problem of each task, shape (problems,): a statistic over several tasks is the
mean of the tasks' means, and problems are drawn again within their task. Everything is determined by `seed`.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import comb
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rotrl.errors import EvaluationError

Array = NDArray[np.floating]
RESAMPLES = 10_000


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """`a - b` with its problem-level interval, the sign-flip p-value, and problems where a is better, equal, worse."""

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int


def counts(correct: Array) -> tuple[Array, Array]:
    """(samples, successes) per problem, over the samples that could be graded."""
    return np.sum(~np.isnan(correct), axis=-1), np.nansum(correct, axis=-1)


def avg_at_n(correct: Array) -> Array:
    """Share of correct samples per problem; NaN for a problem without a graded sample."""
    samples, successes = counts(correct)
    return np.where(samples > 0, successes / np.maximum(samples, 1), np.nan)


def pass_at_k(correct: Array, k: int) -> Array:
    """Unbiased probability per problem that one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, eq. 1. EvaluationError where k exceeds the samples of a problem; a problem
    without any graded sample gives NaN.
    """
    samples, successes = counts(correct)
    graded = samples > 0
    if k < 1 or (graded.any() and k > samples[graded].min()):
        raise EvaluationError(f"pass@{k} needs at least {k} graded samples of every problem; raise n or lower ks")
    return np.where(graded, _pass_at_k(np.maximum(samples, k), successes, k), np.nan)


def _pass_at_k(samples: Array, successes: Array, k: int) -> Array:
    j = np.arange(k)
    missed = np.maximum(samples[..., None] - successes[..., None] - j, 0) / (samples[..., None] - j)
    return 1 - np.prod(missed, axis=-1)


def problem_interval(
    strata: Sequence[Array], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over problems, as if the problems were drawn from a larger set: expanded percentile bootstrap.

    The percentiles are widened for the bootstrap's small-sample bias (Hesterberg 2015, arXiv 1411.5279, sec. 4.2).
    Where all values are equal nothing varies, and 0 or 1 gets the exact binomial bound of that many problems.
    """
    values = _clean(strata)
    mean = float(np.mean([v.mean() for v in values]))
    if all(np.ptp(v) == 0 for v in values):
        bound = ((1 - level) / 2) ** (1 / min(map(len, values)))
        return Interval(mean, bound if mean == 1 else mean, 1 - bound if mean == 0 else mean)
    means = np.mean([_draws(len(v), resamples, seed + i) @ v for i, v in enumerate(values)], axis=0)
    return Interval(mean, *_percentiles(means, level, min(map(len, values))))


def sampling_interval(correct: Sequence[Array], k: int = 1, *, level: float = 0.95) -> Interval:
    """pass@k (k = 1: avg@n) on exactly these problems, were they sampled anew. NaN bounds from one sample a problem.

    A problem's variance is that of its estimate under Binomial(n, c / n), times n / (n - 1); the interval is normal.
    """
    means, variances = [], []
    for matrix in correct:
        samples, successes = counts(matrix)
        samples, successes = samples[samples > 0], successes[samples > 0]
        means.append(_pass_at_k(samples, successes, k).mean())
        variance = np.array([_binomial_variance(int(n), int(c), k) for n, c in zip(samples, successes, strict=True)])
        variances.append(variance.sum() / len(samples) ** 2)
    value = float(np.mean(means))
    half = NormalDist().inv_cdf((1 + level) / 2) * float(np.sqrt(np.sum(variances))) / len(means)
    return (
        Interval(value, max(0.0, value - half), min(1.0, value + half)) if half == half else Interval(value, half, half)
    )


@lru_cache(maxsize=4096)
def _binomial_variance(n: int, c: int, k: int) -> float:
    if n < 2:
        return float("nan")
    x, p = range(n + 1), c / n
    chance = np.array([comb(n, i) * p**i * (1 - p) ** (n - i) for i in x])
    values = _pass_at_k(np.full(n + 1, float(n)), np.array(x, dtype=float), k)
    return float(chance @ values**2 - (chance @ values) ** 2) * n / (n - 1)


def paired_difference(
    a: Sequence[Array], b: Sequence[Array], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Mean over problems of `a - b`, the same problems in the same order in both.

    Interval: bootstrap over problems. p-value: two-sided sign flips of the problems' differences, (1 + #) / (1 + B).
    """
    deltas = _clean([np.asarray(x) - np.asarray(y) for x, y in zip(a, b, strict=True)])
    joined = np.concatenate(deltas)
    tally = (int((joined > 0).sum()), int((joined == 0).sum()), int((joined < 0).sum()))
    if not joined.any():
        return Difference(0.0, 0.0, 0.0, 1.0, *tally)
    mean, low, high = problem_interval(deltas, level=level, resamples=resamples, seed=seed)
    flipped = np.mean([_signs(len(d), resamples, seed + i) @ d / len(d) for i, d in enumerate(deltas)], axis=0)
    extreme = int((np.abs(flipped) >= abs(mean) * (1 - 1e-12)).sum())  # the observed signs, up to rounding
    return Difference(mean, low, high, (1 + extreme) / (1 + resamples), *tally)


def retention(
    merge: Sequence[Array],
    base: Sequence[Array],
    expert: Sequence[Array],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Share of the expert's gain that the merge kept: (merge - base) / (expert - base), bootstrapped over problems.

    None unless the interval of the expert's gain lies above 0: of no gain, or of a loss, nothing can be kept.
    """
    gain = paired_difference(expert, base, level=level, resamples=resamples, seed=seed)
    if not gain.low > 0:
        return None
    triples = _clean([np.stack([m, b, e], axis=-1) for m, b, e in zip(merge, base, expert, strict=True)])
    draws = np.sum([_draws(len(t), resamples, seed + i) @ t for i, t in enumerate(triples)], axis=0)
    m, b, e = np.sum([t.mean(axis=0) for t in triples], axis=0)
    drawn = draws[draws[:, 2] != draws[:, 1]]
    ratios = (drawn[:, 0] - drawn[:, 1]) / (drawn[:, 2] - drawn[:, 1])
    return Interval(float((m - b) / (e - b)), *_percentiles(ratios, level, min(map(len, triples))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of one false finding in the whole table stays below the threshold."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def difference_standard_error(problems: int, n: int, *, within: float = 0.13, between: float = 0.05) -> float:
    """Standard error of a paired difference of avg@n: sqrt((2 within / n + between^2) / problems).

    `within` is the mean of p (1 - p) over problems (.07 to .13 for 1.5B reasoning models on AIME); `between` the
    standard deviation over problems of the true difference, 0 for the error on exactly these problems.
    """
    return float(np.sqrt((2 * within / n + between**2) / problems))


def smallest_visible_difference(
    problems: int, n: int, *, within: float = 0.13, between: float = 0.05, level: float = 0.95, power: float = 0.8
) -> float:
    """The true difference of avg@n that a comparison finds with this power: (z_level + z_power) standard errors."""
    z = NormalDist().inv_cdf
    return (z((1 + level) / 2) + z(power)) * difference_standard_error(problems, n, within=within, between=between)


def _clean(strata: Sequence[Array]) -> list[Array]:
    """Problems with a value everywhere; a task may lose some, but not all."""
    kept = []
    for values in strata:
        values = np.asarray(values, dtype=float)
        values = values[~np.isnan(values).reshape(len(values), -1).any(axis=1)]
        if not len(values):
            raise EvaluationError("a task has no problem that was graded for every model compared; see the alarms")
        kept.append(values)
    return kept


def _percentiles(draws: Array, level: float, problems: int) -> tuple[float, float]:
    from scipy.special import stdtrit

    if problems > 1:
        t = stdtrit(problems - 1, (1 + level) / 2) * np.sqrt(problems / (problems - 1))
        level = 2 * NormalDist().cdf(float(t)) - 1
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _draws(problems: int, resamples: int, seed: int) -> Array:
    """(resamples, problems): how often each problem was drawn, over the number drawn; all models share it."""
    rng = np.random.default_rng([seed, problems])
    drawn = rng.integers(problems, size=(resamples, problems)) + problems * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * problems).reshape(resamples, problems) / problems


@lru_cache(maxsize=16)
def _signs(problems: int, resamples: int, seed: int) -> Array:
    return np.random.default_rng([seed, problems, 1]).integers(2, size=(resamples, problems)) * 2.0 - 1
