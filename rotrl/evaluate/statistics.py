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
from rotrl.evaluate.resampling import draws, percentiles, signs, weighed

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
    means = np.mean([weighed(draws(len(v), resamples, seed + i), v) for i, v in enumerate(values)], axis=0)
    return Interval(mean, *percentiles(means, level, min(map(len, values))))


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

    Interval: bootstrap over problems. p-value: two-sided sign flips of the problems' differences, (1 + #) / (1 + B);
    where no flip was as extreme, Hoeffding's bound 2 exp(-T^2 / (2 sum d^2)) of T = sum d if that is smaller.
    """
    deltas = _clean([np.asarray(x) - np.asarray(y) for x, y in zip(a, b, strict=True)])
    joined = np.concatenate(deltas)
    tally = (int((joined > 0).sum()), int((joined == 0).sum()), int((joined < 0).sum()))
    if not joined.any():
        return Difference(0.0, 0.0, 0.0, 1.0, *tally)
    mean, low, high = problem_interval(deltas, level=level, resamples=resamples, seed=seed)
    flipped = np.mean([weighed(signs(len(d), resamples, seed + i), d) for i, d in enumerate(deltas)], axis=0)
    extreme = int((np.abs(flipped) >= abs(mean) * (1 - 1e-12)).sum())  # the observed signs, up to rounding
    p_value = (1 + extreme) / (1 + resamples)
    if not extreme:  # a table of hundreds of comparisons needs p-values below 1 / B
        spread = sum((d**2).sum() / len(d) ** 2 for d in deltas) / len(deltas) ** 2
        p_value = min(p_value, 2 * float(np.exp(-(mean**2) / (2 * spread))))
    return Difference(mean, low, high, p_value, *tally)


def equivalence(a: Sequence[Array], b: Sequence[Array], *, margin: float) -> float:
    """p-value of two one-sided t-tests (TOST): how likely this is of models that lie `margin` or more apart.

    Below .05 the 90 % interval of the paired difference lies within the margin: the models are equivalent, which "not
    significantly different" never says. Where all problems differ by the same, the margin's exact binomial bound.
    Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657.
    """
    from scipy.special import stdtr

    deltas = _clean([np.asarray(x) - np.asarray(y) for x, y in zip(a, b, strict=True)])
    problems, mean = min(map(len, deltas)), abs(float(np.mean([d.mean() for d in deltas])))
    if mean >= margin or problems < 2:
        return 1.0
    error = float(np.sqrt(sum(d.var(ddof=1) / len(d) for d in deltas))) / len(deltas)
    if error < 1e-12:
        return (1 - (margin - mean)) ** problems
    return float(stdtr(problems - 1, (mean - margin) / error))  # the nearer side's p-value is the larger one


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
    drawn = np.sum([weighed(draws(len(t), resamples, seed + i), t) for i, t in enumerate(triples)], axis=0)
    m, b, e = np.sum([t.mean(axis=0) for t in triples], axis=0)
    drawn = drawn[drawn[:, 2] != drawn[:, 1]]
    ratios = (drawn[:, 0] - drawn[:, 1]) / (drawn[:, 2] - drawn[:, 1])
    return Interval(float((m - b) / (e - b)), *percentiles(ratios, level, min(map(len, triples))))


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
