import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotrl.align.data import Rollout, TrainBatches, collate, heldout_batches, load_rollouts, read_rollouts, split
from rotrl.errors import ConfigError


def rollouts(count: int, per_problem: int = 1) -> list[Rollout]:
    return [
        Rollout(tuple(range(1, 3 + i % 4)), tuple(range(5, 6 + i % 7)), f"p{i}")
        for i in range(count)
        for _ in range(per_problem)
    ]


def line(**changes: object) -> str:
    return json.dumps({"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "problem_id": "p", **changes})


def test_reads_cuts_and_leaves_out_what_is_empty(tmp_path: Path):
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join([line(), line(completion_ids=[]), line(prompt_ids=[1, 2, 3, 4])]) + "\n")
    assert read_rollouts(path, max_tokens=4) == [Rollout((1, 2), (3, 4), "p")]
    assert [len(r) for r in read_rollouts(path)] == [5, 7]


@pytest.mark.parametrize(
    "bad", ["{", "[]", line(prompt_ids=[]), line(completion_ids="x"), json.dumps({"prompt_ids": [1]}), "7"]
)
def test_a_bad_line_is_named(tmp_path: Path, bad: str):
    path = tmp_path / "math.jsonl"
    path.write_text(line() + "\n" + bad + "\n")
    with pytest.raises(ConfigError, match=r"math\.jsonl: line 2 is no rollout"):
        read_rollouts(path)


def test_absent_files_teachers_and_tokens_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.jsonl: rollouts can't be read"):
        read_rollouts(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="rollouts of math, code are missing"):
        load_rollouts(["math", "code"], None, max_tokens=None)
    (tmp_path / "empty.jsonl").write_text(line(completion_ids=[]))
    with pytest.raises(ConfigError, match=r"empty\.jsonl: holds no completion"):
        read_rollouts(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="rollouts of math: one problem"):
        split({"math": rollouts(1, 4)}, seed=0, heldout=0.1)


@given(st.integers(2, 40), st.floats(0, 1), st.integers(0, 5), st.one_of(st.none(), st.integers(1, 50)))
@settings(max_examples=60, deadline=None)
def test_the_split_keeps_problems_apart(problems, heldout, seed, prompts):
    given = {"math": rollouts(problems, 3)}
    learn, kept = split(given, seed=seed, heldout=heldout, prompts=prompts)
    learned, measured = ({r.problem for r in part["math"]} for part in (learn, kept))
    assert learned
    assert measured
    assert not learned & measured
    assert len(learned) == min(problems - len(measured), prompts or problems)
    assert len(learn["math"]) == 3 * len(learned)
    again = split({"math": list(reversed(given["math"]))}, seed=seed, heldout=heldout, prompts=prompts)
    assert {r.problem for r in again[1]["math"]} == measured


def test_predicts_marks_the_token_before_each_sampled_one():
    batch = collate([Rollout((7, 8), (1, 2, 3), "a"), Rollout((9,), (4,), "b")])
    assert batch["ids"].tolist() == [[7, 8, 1, 2, 3], [9, 4, 0, 0, 0]]
    assert batch["predicts"].int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_shows_no_rollout_twice(count, size, seed):
    given = [Rollout((1,), tuple(range(2, 3 + i % 9)), str(i)) for i in range(count)]
    batches = TrainBatches({"math": given}, batch=size, steps=10**6, seed=seed)
    used = min(size, count)
    epoch = [r.problem for step in range(count // used) for r in batches._choose("math", step)]
    assert len(epoch) == len(set(epoch)) == count // used * used


def test_batches_follow_from_seed_and_step_so_that_a_resumed_run_sees_the_same():
    def make() -> TrainBatches:
        return TrainBatches({"math": rollouts(30), "code": rollouts(17)}, batch=4, steps=25, seed=3)

    whole = list(make())
    assert len(whole) == len(make()) == 25
    first, second = make(), make()
    iterator = iter(first)
    for _ in range(9):
        next(iterator)
    second.load_state_dict(first.state_dict())
    for a, b in zip(list(second), whole[9:], strict=True):
        assert all(torch.equal(a[name]["ids"], b[name]["ids"]) for name in ("math", "code"))


def test_heldout_batches_hold_every_rollout_once():
    given = rollouts(11)
    batches = heldout_batches({"math": given, "code": given[:3]}, batch=4)
    assert [list(batch) for batch in batches] == [["math"]] * 3 + [["code"]]
    tokens = sum(int(batch["math"]["predicts"].sum()) for batch in batches[:3])
    assert tokens == sum(len(r.completion) for r in given)
