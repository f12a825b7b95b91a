"""Rollouts: what an expert sampled, split by problem, in batches of like length whose order the seed fixes."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rotrl.errors import ConfigError

WINDOW = 8  # batches that are sorted by length together: little padding, yet every epoch has other batches

Batch = dict[str, dict[str, Tensor]]  # teacher -> {"ids", "predicts", "count"}, see `collate`


@dataclass(frozen=True)
class Rollout:
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    problem: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def read_rollouts(path: Path, *, max_tokens: int | None = None) -> list[Rollout]:
    """Lines {"prompt_ids", "completion_ids", "problem_id"} of one expert's samples at temperature 1.

    Cuts prompt and completion together at `max_tokens` and leaves out what holds no completion token. ConfigError
    names file and line.
    """
    rollouts = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: rollouts can't be read ({error}); sample the expert again") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompt, completion = tuple(map(int, entry["prompt_ids"])), tuple(map(int, entry["completion_ids"]))
            problem = str(entry["problem_id"])
            if not prompt:
                raise ValueError("prompt_ids is empty")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: line {number} is no rollout ({error!r}); sample the expert again") from error
        completion = completion[: None if max_tokens is None else max(0, max_tokens - len(prompt))]
        if completion:
            rollouts.append(Rollout(prompt, completion, problem))
    if not rollouts:
        raise ConfigError(f"{path}: holds no completion; raise align.max_tokens or sample the expert again")
    return rollouts


def load_rollouts(
    teachers: Iterable[str], rollouts: Mapping[str, Path] | None, *, max_tokens: int | None
) -> dict[str, list[Rollout]]:
    """The rollouts of every teacher (see `read_rollouts`). ConfigError names the teachers that have none."""
    teachers, given = list(teachers), rollouts or {}
    if absent := [name for name in teachers if name not in given]:
        raise ConfigError(
            f"rollouts of {', '.join(absent)} are missing; the logit objective needs samples of each teacher"
        )
    return {name: read_rollouts(given[name], max_tokens=max_tokens) for name in teachers}


def split(
    rollouts: Mapping[str, Sequence[Rollout]], *, seed: int, heldout: float, prompts: int | None = None
) -> tuple[dict[str, list[Rollout]], dict[str, list[Rollout]]]:
    """(training, held-out) rollouts of every teacher, disjoint by problem.

    Problems are ordered by hash of seed and id; the first `heldout` of them (a share, at least one) are held out and
    the next `prompts` (None: all others) are learned from.
    """
    learn: dict[str, list[Rollout]] = {}
    kept: dict[str, list[Rollout]] = {}
    for name, given in rollouts.items():
        ranks = {rollout.problem: hashlib.sha256(f"{seed}/{rollout.problem}".encode()).hexdigest() for rollout in given}
        if len(ranks) < 2:
            raise ConfigError(
                f"rollouts of {name}: one problem; two or more are needed, to learn from and to measure on"
            )
        problems = sorted(ranks, key=lambda problem: ranks[problem])
        out = min(max(1, round(heldout * len(problems))), len(problems) - 1)
        measured, learned = set(problems[:out]), set(problems[out : None if prompts is None else out + prompts])
        learn[name] = [rollout for rollout in given if rollout.problem in learned]
        kept[name] = [rollout for rollout in given if rollout.problem in measured]
    return learn, kept


def collate(rollouts: Sequence[Rollout], rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """ids (sequences, length), padded on the right with 0, predicts (same shape): is the NEXT token a sampled one, and
    count: the sampled tokens of all rollouts over the number of ranks, so that what each rank sums over its own tokens
    and divides by `count` is in the mean over ranks the mean over all tokens.

    A rank has each `ranks`-th rollout; where none is left for it, one that predicts nothing. A causal model never
    looks at what stands to its right, so padding needs no attention mask.
    """
    own = rollouts[rank::ranks]
    shown = own or rollouts[:1]
    ids = torch.zeros(len(shown), max(map(len, shown)), dtype=torch.long)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, rollout in enumerate(shown):
        ids[row, : len(rollout)] = torch.tensor(rollout.prompt + rollout.completion)
        predicts[row, len(rollout.prompt) - 1 : len(rollout) - 1] = bool(own)
    sampled = sum(len(rollout.completion) for rollout in rollouts)
    return {"ids": ids, "predicts": predicts, "count": torch.tensor(sampled / ranks)}


class TrainBatches:
    """One batch of every teacher per step, or a rank's share of it. The batch of a step follows from seed and step
    alone, so that a resumed run sees what an uninterrupted one sees; Lightning keeps the position through state_dict.
    """

    def __init__(
        self,
        rollouts: Mapping[str, Sequence[Rollout]],
        *,
        batch: int,
        steps: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.rollouts, self.batch, self.steps, self.seed = dict(rollouts), batch, steps, seed
        self.rank, self.ranks = rank, ranks
        self.position = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while self.position < self.steps:
            self.position += 1
            yield self.at(self.position - 1)

    def at(self, step: int) -> Batch:
        """The batch of `step`."""
        return {name: collate(self._choose(name, step), self.rank, self.ranks) for name in self.rollouts}

    def _choose(self, name: str, step: int) -> list[Rollout]:
        rollouts = self.rollouts[name]
        size = min(self.batch, len(rollouts))
        epoch, place = divmod(step, len(rollouts) // size)
        order = random.Random(f"{self.seed}/{name}/{epoch}")
        shuffled = order.sample(range(len(rollouts)), len(rollouts) // size * size)
        chunks = []
        for start in range(0, len(shuffled), WINDOW * size):
            window = sorted(shuffled[start : start + WINDOW * size], key=lambda index: len(rollouts[index]))
            chunks += [window[i : i + size] for i in range(0, len(window), size)]
        order.shuffle(chunks)
        return [rollouts[index] for index in chunks[place]]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def heldout_batches(rollouts: Mapping[str, Sequence[Rollout]], *, batch: int) -> list[Batch]:
    """Every rollout once, one teacher a batch, sorted by length."""
    batches = []
    for name, chosen in rollouts.items():
        ordered = sorted(chosen, key=len)
        batches += [{name: collate(ordered[start : start + batch])} for start in range(0, len(ordered), batch)]
    return batches
