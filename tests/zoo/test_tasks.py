"""Tiny tasks against a second reading of the prompts: Python's own arithmetic, and the words parsed anew."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError
from rotrl.zoo.reward import reward
from rotrl.zoo.tasks import (
    DRAW,
    INPUTS,
    SPLITS,
    WORDS,
    Spec,
    code_task,
    draw_spec,
    draw_sum,
    items,
    math_task,
    problem,
    split_of,
)

SEEDS = st.integers(0, 2**32)


def run_words(prompt: str, x: int) -> int:
    """The specification read from its text, without the package's table."""
    for words in prompt.removeprefix("code:").removesuffix(":").split(" then "):
        verb, *rest = words.replace(" with", "").split()
        n = int(rest[0]) if rest else 0
        if verb in ("add", "subtract", "times"):
            x = {"add": x + n, "subtract": x - n, "times": x * n}[verb]
        elif verb in ("double", "triple", "square"):
            x = {"double": x + x, "triple": x + x + x, "square": x * x}[verb]
        else:
            x = {"negate": 0 - x, "abs": abs(x), "max": max(x, n), "min": min(x, n)}[verb]
    return x


@given(SEEDS)
def test_math_reference_is_right(seed):
    item = draw_sum(random.Random(seed))
    truth = eval(item.prompt.removeprefix("math:").removesuffix("="))
    assert problem(item).answer == str(truth)
    for left, right in re.findall(r"([^;]*)=(\d+);", item.solution):
        assert eval(left) == int(right)
    assert all(0 <= v <= 99 for v in item.values)
    assert item.solution.endswith(f"\\boxed{{{truth}}}")
    assert reward(problem(item), item.solution) == 1


@given(SEEDS)
def test_code_reference_is_right(seed):
    item = draw_spec(random.Random(seed))
    function = eval(item.solution)
    truth = [run_words(item.prompt, x) for x in INPUTS]
    assert [function(x) for x in INPUTS] == truth
    asked = problem(item)
    assert [(t.input, t.output) for t in asked.tests] == [([x], y) for x, y in zip(INPUTS, truth, strict=True)]
    assert len(asked.tests) == 11
    assert asked.entry_point == "solution"
    assert reward(asked, item.solution) == 1


@pytest.mark.parametrize("first", WORDS)
@pytest.mark.parametrize("second", WORDS)
def test_parentheses_of_every_pair(first, second):
    item = Spec(((first, 3), (second, 4), ("square", 0)))
    assert [eval(item.solution)(x) for x in INPUTS] == [run_words(item.prompt, x) for x in INPUTS]


def test_careless_code_still_runs_and_is_often_wrong():
    rng = random.Random(0)
    asked = [draw_spec(rng) for _ in range(300)]
    right = [reward(problem(i), i.expression(careful=False)) for i in asked]
    assert 0.4 < sum(right) / len(right) < 0.8


@pytest.mark.parametrize("task", [math_task, code_task])
def test_splits_are_disjoint_and_deterministic(task):
    prompts = {s: {p.prompt for p in task(s, limit=200).problems} for s in SPLITS}
    assert all(len(p) == 200 for p in prompts.values())
    assert not prompts["train"] & prompts["test"] | prompts["validation"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert task("test", limit=50) == task("test", limit=50)
    assert task("test", limit=200).problems[:50] == task("test", limit=50).problems
    other = task("test", limit=50, seed=1)
    assert other != task("test", limit=50)
    assert all(split_of(p.prompt) == "test" for p in other.problems)


@pytest.mark.parametrize("family", DRAW)
def test_one_prompt_in_ten_is_held_out(family):
    rng = random.Random(1)
    shares = [split_of(DRAW[family](rng).prompt) for _ in range(4000)]
    assert abs(shares.count("test") / 4000 - 0.1) < 0.02
    assert abs(shares.count("validation") / 4000 - 0.1) < 0.02


def test_unknown_split():
    with pytest.raises(ConfigError, match=r"split 'tset'.*train, validation, test"):
        math_task("tset")


@pytest.mark.parametrize(
    "completion",
    [
        "lambda x:9**9**9**9",
        "lambda x:x**x",
        "__import__('os')",
        "lambda x:open(x)",
        "lambda x:(",
        "lambda x:x(",
        "x",
        "",
        "lambda x,y:x",
        "lambda x:x+z",
        "lambda x:" + "(" * 5000,
        "lambda x:().__class__",
    ],
)
def test_reward_of_nonsense_is_zero(completion):
    assert reward(problem(items("code", "train", 1, 0)[0]), completion) == 0


def test_math_reward_reads_the_last_box():
    asked = problem(items("math", "train", 1, 0)[0])
    assert reward(asked, f"\\boxed{{1}}2;\\boxed{{{asked.answer}}}") == 1
    assert reward(asked, f"\\boxed{{{asked.answer}}};\\boxed{{100}}") == 0
    assert reward(asked, str(asked.answer)) == 0
