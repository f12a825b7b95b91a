"""Which problems a bootstrap draws and which signs a test flips: the same for all models, determined by the seed."""

from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
BLOCK = 1 << 20  # numbers of a block of resamples that is computed at once


def percentiles(drawn: Array, level: float, problems: int) -> tuple[float, float]:
    """Bounds of an interval from resampled values, widened for few problems (Hesterberg 2015, arXiv 1411.5279, 4.2)."""
    from scipy.special import stdtrit

    if problems > 1:
        t = stdtrit(problems - 1, (1 + level) / 2) * np.sqrt(problems / (problems - 1))
        level = 2 * NormalDist().cdf(float(t)) - 1
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def weighed(weights: NDArray[np.integer], values: Array) -> Array:
    """Means over problems under weights (resamples, problems), by blocks: floats would be eight times as large."""
    step = max(1, BLOCK // weights.shape[1])
    return np.concatenate([weights[i : i + step] @ values for i in range(0, len(weights), step)]) / len(values)


@lru_cache(maxsize=16)
def draws(problems: int, resamples: int, seed: int) -> NDArray[np.uint8]:
    """(resamples, problems): how often each problem was drawn; all models share it."""
    rng, step = np.random.default_rng([seed, problems]), max(1, BLOCK // problems)
    drawn = np.empty((resamples, problems), dtype=np.uint8)
    for i in range(0, resamples, step):
        rows = min(step, resamples - i)
        places = rng.integers(problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
        drawn[i : i + rows] = np.bincount(places.ravel(), minlength=rows * problems).reshape(rows, problems)
    return drawn


@lru_cache(maxsize=16)
def signs(problems: int, resamples: int, seed: int) -> NDArray[np.int8]:
    """(resamples, problems) of -1 and 1."""
    flips = np.random.default_rng([seed, problems, 1]).integers(2, size=(resamples, problems), dtype=np.int8)
    return 2 * flips - 1
