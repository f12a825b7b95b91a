"""maj@k: how often the most frequent of k answers is right, from all samples and without drawing any."""

from collections import Counter
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from rotrl.errors import EvaluationError
from rotrl.evaluate.math import last_boxed
from rotrl.evaluate.statistics import Array

RIGHT, SILENT, UNKNOWN = 0, -1, -2  # a vote: the right answer, no answer, not graded; 1, 2, ... are other answers


def answer_of(completion: str) -> str | None:
    r"""The vote of a completion: the text in its last box without spaces, None where there is none."""
    boxed = last_boxed(completion)
    return None if boxed is None else "".join(boxed.strip("$").split())


def maj_at_k(votes: NDArray[np.integer], k: int) -> Array:
    """Chance per problem that the majority of k of its samples is right: the mean over all subsets of k samples.

    `votes` (problems, samples) holds RIGHT, SILENT, UNKNOWN or the number of another answer. Right answers are one
    answer however they are written; wrong ones are told apart by their text. Who is silent has no vote, a tie is
    broken by lot, and k silent samples are wrong. EvaluationError where k exceeds the graded samples of a problem; a
    problem without any gives NaN. Wang et al. 2022, arXiv 2203.11171, sec. 2.
    """
    sizes = np.sum(votes != UNKNOWN, axis=-1)
    if k < 1 or (sizes.any() and k > sizes[sizes > 0].min()):
        raise EvaluationError(f"maj@{k} needs at least {k} graded samples of every problem; raise n or lower ks")
    return np.array([_of_problem(row[row != UNKNOWN], k) for row in votes])


def _of_problem(votes: NDArray[np.integer], k: int) -> float:
    if not len(votes):
        return float("nan")
    counts = Counter(votes.tolist())
    right, silent = counts.pop(RIGHT, 0), counts.pop(SILENT, 0)
    return _chance(right, tuple(sorted(counts.values())), silent, k)


@lru_cache(maxsize=65536)
def _chance(right: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """Sum over j, the votes for the right answer, of the subsets in which no other answer has more than j."""
    subsets, chance = comb(right + sum(others) + silent, k), 0.0
    for j in range(1, min(right, k) + 1):
        free = silent + sum(count for count in others if count < j)  # too few to reach j, however they are drawn
        ways = np.zeros(((k - j) // j + 1, k - j + 1), dtype=object)  # (other answers with j votes, votes so far)
        ways[0] = [comb(free, drawn) for drawn in range(k - j + 1)]
        for count in (count for count in others if count >= j):
            before, ways = ways, ways.copy()
            for drawn in range(1, min(j - 1, k - j) + 1):
                ways[:, drawn:] += comb(count, drawn) * before[:, : k - j + 1 - drawn]
            if j <= k - j:
                ways[1:, j:] += comb(count, j) * before[:-1, : k - 2 * j + 1]
        chance += sum(comb(right, j) * int(way) / ((tied + 1) * subsets) for tied, way in enumerate(ways[:, k - j]))
    return chance
