"""Graded samples of one model: their rows, the matrices that statistics work on, and what is alarming about them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotrl.evaluate.majority import RIGHT, SILENT, UNKNOWN, answer_of
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
        "published": verdict.published,
        "model_sha256": weights,
    }


@dataclass
class Tally:
    """The samples of a model on a task, counted one by one so that none has to be kept.

    `correct` (problems, n) is 1 where accepted, 0 where not, NaN where nobody could tell; `published` is the same by
    the protocol's own grader; `votes`, for math alone, are those of `maj_at_k`. `truncated` samples ended at max_tokens
    (of the `ended` whose end is known), `unfinished` ones never closed their <think>; `tokens` is the sum over the
    `counted` samples whose length is known.
    """

    correct: Array
    published: Array
    votes: NDArray[np.integer] | None
    samples: int = 0
    ended: int = 0
    truncated: int = 0
    unfinished: int = 0
    counted: int = 0
    tokens: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # verdicts that say nothing of the model
    dead: set[str] = field(default_factory=set)  # problems that the engine refused
    _answers: dict[int, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, n: int) -> "Tally":
        shape = (len(task.problems), n)
        votes = np.full(shape, UNKNOWN, dtype=np.int32) if task.grader == "math" else None
        return cls(np.full(shape, np.nan), np.full(shape, np.nan), votes)

    def add(self, place: int, row: Mapping[str, Any], *, thinks: bool) -> None:
        """Count a graded row of the problem at `place`; `thinks`: its prompt opens <think>."""
        index, verdict, text = row["sample_index"], row["verdict"], row["completion"]
        self.samples += 1
        self.ended += row["finish_reason"] is not None
        self.truncated += row["finish_reason"] == "length"
        self.unfinished += (thinks or "<think>" in text) and "</think>" not in text
        if row["tokens"] is not None:
            self.counted += 1
            self.tokens += row["tokens"]
        if row.get("published") is not None:
            self.published[place, index] = row["published"]
        if verdict == ENGINE_ERROR.verdict:
            self.dead.add(row["problem_id"])
        elif verdict in UNGRADABLE:
            self.lost[verdict] += 1
        else:
            self.correct[place, index] = verdict == "accepted"
            if self.votes is not None:
                self.votes[place, index] = self._vote(place, verdict, text)

    def _vote(self, place: int, verdict: str, text: str) -> int:
        if verdict == "accepted":
            return RIGHT
        if (answer := answer_of(text)) is None:
            return SILENT
        known = self._answers.setdefault(place, {})
        return known.setdefault(answer, len(known) + 1)


Tallies = Mapping[str, Tally]  # by task


def alarms(model: str, tallies: Tallies) -> list[str]:
    """Sentences on what makes the scores of this model less than they seem."""
    found = []
    for task, tally in tallies.items():
        if tally.truncated > ALARMING * tally.samples:
            share = f"{tally.truncated} of {tally.samples} samples"
            found.append(f"{model}, {task}: {share} were cut off at the token limit; raise protocol.max_tokens")
        for verdict, number in sorted(tally.lost.items()):
            found.append(f"{model}, {task}: {number} samples are left out ({verdict})")
        for problem in sorted(tally.dead):
            found.append(f"{model}, {task}: the engine refused problem {problem!r} or died of it; left out")
    return found
