"""scores.csv and comparisons.csv from the matrices of what was correct."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from rotrl.evaluate.output import cell
from rotrl.evaluate.statistics import (
    Array,
    Interval,
    avg_at_n,
    counts,
    paired_difference,
    pass_at_k,
    problem_interval,
    retention,
    sampling_interval,
)

SCORES = (
    "model",
    "task",
    "protocol",
    "metric",
    "value",
    "low",
    "high",
    "sampling_low",
    "sampling_high",
    "problems",
    "samples",
    "truncated",
    "unfinished",
)
COMPARISONS = (
    "a",
    "b",
    "task",
    "difference",
    "low",
    "high",
    "p_value",
    "wins",
    "ties",
    "losses",
    "retention",
    "retention_low",
    "retention_high",
)
MEAN = "mean"  # the task of the rows that hold the mean over tasks
Matrices = Mapping[str, Array]  # by task: (problems, samples) of 1, 0 and NaN


def score_rows(
    model: str,
    matrices: Matrices,
    *,
    protocol: str,
    ks: Sequence[int],
    truncated: Mapping[str, int],
    unfinished: Mapping[str, int],
    seed: int,
) -> list[dict[str, Any]]:
    """avg@n and pass@k of a model on each task, and the mean of avg@n over several tasks.

    A k above the n of a task is left out there. Problems with fewer than k graded samples are left out of pass@k.
    """

    def row(task: str, metric: str, value: Interval, sampling: Interval, samples: int, problems: int) -> dict[str, Any]:
        chosen = list(matrices) if task == MEAN else [task]
        bounds = {"value": value.value, "low": value.low, "high": value.high}
        bounds |= {"sampling_low": sampling.low, "sampling_high": sampling.high}
        return {
            "model": model,
            "task": task,
            "protocol": protocol,
            "metric": metric,
            **{key: cell(bound) for key, bound in bounds.items()},
            "problems": problems,
            "samples": samples,
            "truncated": sum(truncated[name] for name in chosen),
            "unfinished": sum(unfinished[name] for name in chosen),
        }

    rows = []
    for task, matrix in matrices.items():
        graded = counts(matrix)[0]
        for k in (None, *(k for k in ks if k <= matrix.shape[1])):
            used = matrix if k is None else np.where(graded[:, None] >= k, matrix, np.nan)
            values = avg_at_n(used) if k is None else pass_at_k(used, k)
            metric = f"avg@{matrix.shape[1]}" if k is None else f"pass@{k}"
            interval = problem_interval([values], seed=seed)
            size = int(np.sum(~np.isnan(used))), int(np.sum(~np.isnan(values)))
            rows.append(row(task, metric, interval, sampling_interval([used], k or 1), *size))
    if len(matrices) > 1:
        averages = [avg_at_n(matrix) for matrix in matrices.values()]
        size = (
            sum(int(np.sum(~np.isnan(m))) for m in matrices.values()),
            sum(int(np.sum(~np.isnan(a))) for a in averages),
        )
        metric = "avg@" + "/".join(dict.fromkeys(str(matrix.shape[1]) for matrix in matrices.values()))
        sampling = sampling_interval(list(matrices.values()))
        rows.append(row(MEAN, metric, problem_interval(averages, seed=seed), sampling, *size))
    return rows


def comparison_rows(scored: Mapping[str, Matrices], roles: Mapping[str, str], *, seed: int) -> list[dict[str, Any]]:
    """Each expert against the base, each merge against the base, every expert and every other merge: paired by problem,
    on every task and on their mean. Retention stands where a merge meets an expert that gained over the base."""
    bases = [name for name in scored if roles[name] == "base"]
    experts = [name for name in scored if roles[name] == "expert"]
    pairs = [(name, base) for base in bases for name in scored if roles[name] != "base"]
    pairs += [(name, expert) for expert in experts for name in scored if roles[name] == "merge"]
    pairs += combinations([name for name in scored if roles[name] == "merge"], 2)
    averages = {name: {task: avg_at_n(m) for task, m in matrices.items()} for name, matrices in scored.items()}
    rows = []
    for a, b in sorted(pairs, key=lambda pair: list(scored).index(pair[0])):
        tasks = list(averages[a])
        for task in (*tasks, *([MEAN] if len(tasks) > 1 else [])):
            chosen = tasks if task == MEAN else [task]
            sides = {name: [averages[name][t] for t in chosen] for name in {a, b, *bases}}
            found = paired_difference(sides[a], sides[b], seed=seed)
            kept = retention(sides[a], sides[bases[0]], sides[b], seed=seed) if b in experts and bases else None
            interval = kept or Interval(np.nan, np.nan, np.nan)
            numbers = {"difference": found.difference, "low": found.low, "high": found.high, "p_value": found.p_value}
            numbers |= {"retention": interval.value, "retention_low": interval.low, "retention_high": interval.high}
            tally = {"wins": found.wins, "ties": found.ties, "losses": found.losses}
            values = {"a": a, "b": b, "task": task, **{key: cell(x) for key, x in numbers.items()}, **tally}
            rows.append({column: values[column] for column in COMPARISONS})
    return rows
