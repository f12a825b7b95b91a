"""The noisy text that the base learns from: what it half knows, RL can sharpen.

Math: mostly direct guesses, sometimes steps with slips. Code: mostly without the parentheses that precedence asks for,
sometimes with a wrong operation. Drill: the steps of a math problem without its question, always right. It teaches the
arithmetic itself, which answers that are mostly wrong teach too slowly; a clean first phase of math and code would do
so as well, but then RL on either task brings the clean mode back for both.
"""

import random
from dataclasses import dataclass, replace

from rotrl.zoo.tasks import Spec, Sum, calculate, draw_word


@dataclass(frozen=True)
class Noise:
    guess: float = 0.65  # math: answer at once, mostly wrong
    slip: float = 0.15  # math: a step's result is off
    careless: float = 0.8  # code: no parentheses
    bug: float = 0.15  # code: another operation than the one asked for


def text(family: str, item: Sum | Spec, noise: Noise, rng: random.Random) -> tuple[str, str]:
    """Prompt and answer of a training example."""
    if family == "drill":
        head, equals, steps = item.solution.partition("=")
        return head + equals, steps
    return item.prompt, math_answer(item, noise, rng) if isinstance(item, Sum) else code_answer(item, noise, rng)


def off(value: int, rng: random.Random) -> int:
    return abs(value + rng.choice((-10, -2, -1, 1, 2, 10)))


def math_answer(item: Sum, noise: Noise, rng: random.Random) -> str:
    if rng.random() < noise.guess:
        value = item.values[-1]
        return f"\\boxed{{{value if rng.random() < 0.1 else abs(value + rng.randint(-20, 20))}}}"
    value, steps = item.start, ""
    for sign, n in item.operations:
        result = calculate(value, sign, n)
        result = off(result, rng) if rng.random() < noise.slip else abs(result)
        steps += f"{value}{sign}{n}={result};"
        value = result
    return steps + f"\\boxed{{{value}}}"


def code_answer(item: Spec, noise: Noise, rng: random.Random) -> str:
    operations = tuple(draw_word(rng) if rng.random() < noise.bug else o for o in item.operations)
    return replace(item, operations=operations).expression(careful=rng.random() >= noise.careless)
