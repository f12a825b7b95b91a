"""What the noisy teacher says, and that training's reward agrees with the graders of the evaluation."""

import random

import pytest

from rotrl.evaluate.grade import Grader
from rotrl.evaluate.task import Task
from rotrl.zoo.reward import reward
from rotrl.zoo.tasks import items, problem
from rotrl.zoo.teacher import Noise, text

PERFECT = Noise(0, 0, 0, 0)


@pytest.mark.parametrize("family", ["math", "code"])
def test_a_perfect_teacher_is_right_and_a_noisy_one_mostly_wrong(family):
    asked = items(family, "train", 400, 0)
    rng = random.Random(0)
    assert all(text(family, i, PERFECT, rng) == (i.prompt, i.solution) for i in asked)
    right = [reward(problem(i), text(family, i, Noise(), rng)[1]) for i in asked]
    assert 0.1 < sum(right) / len(right) < 0.6


def test_drill_is_the_solution_without_the_question():
    for item in items("math", "train", 50, 0):
        prompt, answer = text("drill", item, Noise(), random.Random(0))
        assert prompt.endswith("=")
        assert prompt + answer == item.solution


@pytest.mark.slow
@pytest.mark.parametrize("family", ["math", "code"])
def test_reward_agrees_with_the_evaluation(family):
    rng = random.Random(3)
    asked = items(family, "train", 60, 1)
    answers = [text(family, i, Noise(), rng)[1] for i in asked]
    answers[:3] = ["", "\\boxed{", "lambda x:(x"]
    task = Task(family, tuple(map(problem, asked)), family)
    with Grader([task]) as grader:
        futures = [grader.submit(task, p, a) for p, a in zip(task.problems, answers, strict=True)]
        verdicts = [f.result(timeout=60) for f in futures]
    assert all(v.correct is not None for v in verdicts)
    assert [float(bool(v.correct)) for v in verdicts] == [
        reward(p, a) for p, a in zip(task.problems, answers, strict=True)
    ]
