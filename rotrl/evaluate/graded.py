"""Graded samples of one model: their rows, the matrices that statistics work on, and what is alarming about them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rotrl.evaluate.prompts import Prompts
from rotrl.evaluate.samples import Wanted
from rotrl.evaluate.sampling import sample_seed
from rotrl.evaluate.statistics import Array
from rotrl.evaluate.store import Row
from rotrl.evaluate.task import Task
from rotrl.evaluate.verdict import UNGRADABLE, Verdict

ENGINE_ERROR = Verdict("engine error", None, "engine", "the engine refused this prompt or died of it")
ALARMING = 0.2  # share of samples cut off at max_tokens from which a score is one of the limit, not of the model


def graded_row(wanted: Wanted, row: Row, verdict: Verdict, *, run_seed: int, weights: str) -> dict[str, Any]:
    """One line of samples/<model>.jsonl."""
    return {
        "task": wanted.task,
        "problem_id": wanted.problem,
        "sample_index": wanted.index,
        "seed": sample_seed(run_seed, wanted.problem, wanted.index),
        "prompt_sha256": wanted.prompt.sha256,
        "completion": row["completion"],
        "finish_reason": row["finish_reason"],
        "tokens": row["tokens"],
        "verdict": verdict.verdict,
        "grader": verdict.grader,
        "model_sha256": weights,
    }


def correct_matrices(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[Task], n: Mapping[str, int]
) -> dict[str, Array]:
    """By task, (problems, n): 1 where accepted, 0 where not, NaN where nobody could tell."""
    ungradable = UNGRADABLE | {ENGINE_ERROR.verdict}
    matrices = {task.name: np.full((len(task.problems), n[task.name]), np.nan) for task in tasks}
    place = {(task.name, problem.id): i for task in tasks for i, problem in enumerate(task.problems)}
    for row in rows:
        if row["verdict"] not in ungradable:
            cell = place[row["task"], row["problem_id"]], row["sample_index"]
            matrices[row["task"]][cell] = row["verdict"] == "accepted"
    return matrices


def count_cut(rows: Sequence[Mapping[str, Any]], tasks: Sequence[Task], prompts: Prompts) -> dict[str, dict[str, int]]:
    """By task: samples that ended at max_tokens (truncated), and that never closed their <think> (unfinished)."""
    cut = {kind: dict.fromkeys((task.name for task in tasks), 0) for kind in ("truncated", "unfinished")}
    for row in rows:
        thinks = prompts[row["task"], row["problem_id"]].thinks or "<think>" in row["completion"]
        cut["truncated"][row["task"]] += row["finish_reason"] == "length"
        cut["unfinished"][row["task"]] += thinks and "</think>" not in row["completion"]
    return cut


def alarms(model: str, rows: Sequence[Mapping[str, Any]], truncated: Mapping[str, int]) -> list[str]:
    """Sentences on what makes the scores of this model less than they seem."""
    found, size = [], Counter(row["task"] for row in rows)
    for task, number in truncated.items():
        if number > ALARMING * size[task]:
            share = f"{number} of {size[task]} samples"
            found.append(f"{model}, {task}: {share} were cut off at the token limit; raise protocol.max_tokens")
    lost = Counter((row["task"], row["verdict"]) for row in rows if row["verdict"] in UNGRADABLE)
    for (task, verdict), number in sorted(lost.items()):
        found.append(f"{model}, {task}: {number} samples are left out ({verdict})")
    dead = sorted({(row["task"], row["problem_id"]) for row in rows if row["verdict"] == ENGINE_ERROR.verdict})
    for task, problem in dead:
        found.append(f"{model}, {task}: the engine refused problem {problem!r} or died of it; left out")
    return found
