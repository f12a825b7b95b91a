"""scores.csv and comparisons.csv from the matrices of what was correct."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rotrl.evaluate.graded import Tallies, Tally
from rotrl.evaluate.majority import UNKNOWN, maj_at_k
from rotrl.evaluate.output import cell, write_csv
from rotrl.evaluate.statistics import (
    Array,
    Interval,
    avg_at_n,
    counts,
    equivalence,
    holm,
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
    "tokens",
    "score_published",
    "disagreement",
)
COMPARISONS = (
    "a",
    "b",
    "task",
    "difference",
    "low",
    "high",
    "p_value",
    "p_holm",
    "wins",
    "ties",
    "losses",
    "retention",
    "retention_low",
    "retention_high",
    "margin",
    "p_equivalence",
)
MEAN = "mean"  # the task of the rows that hold the mean over tasks
MARGIN = 0.02  # models whose scores differ by less are the same to a user
UNKNOWN_INTERVAL = Interval(np.nan, np.nan, np.nan)
Matrices = Mapping[str, Array]  # by task: (problems, samples) of 1, 0 and NaN


def score_rows(
    model: str, tallies: Tallies, *, protocol: str, ks: Sequence[int], seed: int, select: Collection[str] = ()
) -> list[dict[str, Any]]:
    """avg@n, pass@k and, for math, maj@k of a model on each task; the mean of avg@n over the tasks not in `select`.

    A k above the n of a task is left out there. Problems with fewer than k graded samples are left out of pass@k and
    maj@k. `tokens` is the mean over samples; counts that nobody knows are None. maj@k has no sampling interval.
    `score_published` is the same metric by the protocol's own grader, `disagreement` the share of samples on which it
    differs from the strict one; None where there is none.
    """
    rows = []
    for task, tally in tallies.items():
        graded, size = counts(tally.correct)[0], tally.correct.shape[1]
        about = {"model": model, "task": task, "protocol": protocol}
        interval = problem_interval([avg_at_n(tally.correct)], seed=seed)
        rows.append(_row(about | {"metric": f"avg@{size}"}, interval, [tally], sampling_interval([tally.correct])))
        possible = [k for k in ks if k <= graded.max()]
        for k in possible:
            used = np.where(graded[:, None] >= k, tally.correct, np.nan)
            interval = problem_interval([pass_at_k(used, k)], seed=seed)
            rows.append(_row(about | {"metric": f"pass@{k}"}, interval, [tally], sampling_interval([used], k), k))
        for k in (k for k in possible if k > 1):
            if tally.votes is None:
                break
            votes = np.where(graded[:, None] >= k, tally.votes, UNKNOWN)
            interval = problem_interval([maj_at_k(votes, k)], seed=seed)
            rows.append(_row(about | {"metric": f"maj@{k}"}, interval, [tally], UNKNOWN_INTERVAL, k))
    chosen = [tally for task, tally in tallies.items() if task not in select]
    if len(chosen) > 1:
        sizes = "/".join(dict.fromkeys(str(tally.correct.shape[1]) for tally in chosen))
        interval = problem_interval([avg_at_n(tally.correct) for tally in chosen], seed=seed)
        about = {"model": model, "task": MEAN, "protocol": protocol, "metric": f"avg@{sizes}"}
        rows.append(_row(about, interval, chosen, sampling_interval([tally.correct for tally in chosen])))
    return rows


def score(
    tallies: Mapping[str, Tallies],
    roles: Mapping[str, str],
    out: Path,
    *,
    protocol: str,
    ks: Sequence[int],
    seed: int,
    margin: float = MARGIN,
    select: Collection[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Write scores.csv and comparisons.csv of all models below `out`; give their rows as {scores, comparisons}."""
    scores = [
        row
        for model, counted in tallies.items()
        for row in score_rows(model, counted, protocol=protocol, ks=ks, seed=seed, select=select)
    ]
    matrices = {model: {task: tally.correct for task, tally in counted.items()} for model, counted in tallies.items()}
    comparisons = comparison_rows(matrices, roles, seed=seed, margin=margin, select=select)
    write_csv(out / "scores.csv", SCORES, scores)
    write_csv(out / "comparisons.csv", COMPARISONS, comparisons)
    return {"scores": scores, "comparisons": comparisons}


def _row(
    about: dict[str, Any], value: Interval, tallies: Sequence[Tally], sampling: Interval, least: int = 1
) -> dict[str, Any]:
    """A row of scores.csv; `least`: graded samples that a problem must have to count."""
    graded = [counts(tally.correct)[0] for tally in tallies]
    bounds = {"value": value.value, "low": value.low, "high": value.high}
    bounds |= {"sampling_low": sampling.low, "sampling_high": sampling.high}
    counted = sum(tally.counted for tally in tallies)
    return {
        **about,
        **{key: cell(bound) for key, bound in bounds.items()},
        "problems": sum(int((each >= least).sum()) for each in graded),
        "samples": sum(int(each[each >= least].sum()) for each in graded),
        "truncated": sum(t.truncated for t in tallies) if any(t.ended for t in tallies) else None,
        "unfinished": sum(t.unfinished for t in tallies),
        "tokens": round(sum(t.tokens for t in tallies) / counted, 1) if counted else None,
        "score_published": cell(float(np.mean([_published(t.published, about["metric"]) for t in tallies]))),
        "disagreement": cell(_disagreement(tallies)),
    }


def _published(verdicts: Array, metric: str) -> float:
    """avg@n or pass@k of the protocol's own verdicts; NaN for maj@k, and where there are none."""
    name, _, k = metric.partition("@")
    graded = counts(verdicts)[0]
    if name == "maj" or graded.max() < (1 if name == "avg" else int(k)):
        return np.nan
    if name == "avg":
        return float(np.nanmean(avg_at_n(verdicts)))
    return float(np.nanmean(pass_at_k(np.where(graded[:, None] >= int(k), verdicts, np.nan), int(k))))


def _disagreement(tallies: Sequence[Tally]) -> float:
    both = [~np.isnan(tally.correct) & ~np.isnan(tally.published) for tally in tallies]
    samples = sum(int(mask.sum()) for mask in both)
    different = sum(int((t.correct != t.published)[mask].sum()) for t, mask in zip(tallies, both, strict=True))
    return different / samples if samples else np.nan


def comparison_rows(
    scored: Mapping[str, Matrices],
    roles: Mapping[str, str],
    *,
    seed: int,
    margin: float = MARGIN,
    select: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Each expert against the base and every other expert, each merge against the base, every expert and every other
    merge: paired by problem, on every task and on the mean over the tasks not in `select`. Retention stands where a
    merge meets an expert that gained over the base; `p_holm` is adjusted for all rows."""
    base = next((name for name in scored if roles[name] == "base"), None)
    averages = {name: {task: avg_at_n(m) for task, m in matrices.items()} for name, matrices in scored.items()}
    rows = []
    for a, b in _pairs(scored, roles):
        tasks = [task for task in averages[a] if task in averages[b]]
        reported = [task for task in tasks if task not in select]
        for task in (*tasks, *([MEAN] if len(reported) > 1 else [])):
            chosen = reported if task == MEAN else [task]
            sides = {name: [averages[name][t] for t in chosen if t in averages[name]] for name in {a, b, base} - {None}}
            found = paired_difference(sides[a], sides[b], seed=seed)
            kept = None
            if base and roles[a] == "merge" and roles[b] == "expert" and len(sides[base]) == len(chosen):
                kept = retention(sides[a], sides[base], sides[b], seed=seed)
            interval = kept or UNKNOWN_INTERVAL
            numbers = {"difference": found.difference, "low": found.low, "high": found.high}
            numbers |= {"retention": interval.value, "retention_low": interval.low, "retention_high": interval.high}
            tally = {"wins": found.wins, "ties": found.ties, "losses": found.losses}
            same = {"margin": margin, "p_equivalence": cell(equivalence(sides[a], sides[b], margin=margin))}
            about = {"a": a, "b": b, "task": task, "p_value": found.p_value}
            rows.append(about | {key: cell(x) for key, x in numbers.items()} | tally | same)
    adjusted = holm([row["p_value"] for row in rows])
    for row, p_holm in zip(rows, adjusted, strict=True):
        row |= {"p_value": cell(row["p_value"]), "p_holm": cell(p_holm)}
    return [{column: row[column] for column in COMPARISONS} for row in rows]


def _pairs(scored: Mapping[str, Matrices], roles: Mapping[str, str]) -> list[tuple[str, str]]:
    bases, experts, merges = ([name for name in scored if roles[name] == r] for r in ("base", "expert", "merge"))
    pairs = [(name, base) for base in bases for name in (*experts, *merges)]
    pairs += [(b, a) for a, b in combinations(experts, 2)]
    pairs += [(merge, expert) for expert in experts for merge in merges]
    pairs += combinations(merges, 2)
    return sorted(pairs, key=lambda pair: list(scored).index(pair[0]))
