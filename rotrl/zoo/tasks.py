"""Two families of verifiable problems that a model of 300k parameters can learn.

    math:(3+4)*2-5=                            ->  3+4=7;7*2=14;14-5=9;\\boxed{9}
    code:add 3 then double then max with 7:    ->  lambda x:max((x+3)*2,7)

A problem belongs to a split by the hash of its prompt alone (one in ten test, one in ten validation), so splits stay
disjoint whatever seed drew them.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rotrl.errors import ConfigError
from rotrl.evaluate.task import Problem, Task, Test
from rotrl.values import Count

STEPS = 3
INPUTS = tuple(range(-5, 6))
SPLITS = ("train", "validation", "test")


def split_of(prompt: str) -> str:
    return {0: "test", 1: "validation"}.get(int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10, "train")


@dataclass(frozen=True)
class Sum:
    """A chain `((start op n) op n) op n` whose every value lies in 0..99."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        text, loose = str(self.start), False  # loose: a sum at the top level, which `*` would tear apart
        for sign, n in self.operations:
            text = f"({text})*{n}" if sign == "*" and loose else f"{text}{sign}{n}"
            loose = sign != "*"
        return f"math:{text}="

    @property
    def values(self) -> list[int]:
        values = [self.start]
        for sign, n in self.operations:
            values.append(calculate(values[-1], sign, n))
        return values

    @property
    def solution(self) -> str:
        values = self.values
        steps = [f"{v}{sign}{n}={w};" for v, (sign, n), w in zip(values, self.operations, values[1:], strict=False)]
        return "".join(steps) + f"\\boxed{{{values[-1]}}}"


def calculate(value: int, sign: str, n: int) -> int:
    return value + n if sign == "+" else value - n if sign == "-" else value * n


def draw_sum(rng: random.Random) -> Sum:
    start = value = rng.randint(1, 9)
    operations: list[tuple[str, int]] = []
    while len(operations) < STEPS:
        sign = rng.choice("+-*")
        n = rng.randint(2 if sign == "*" else 1, 9)
        if 0 <= calculate(value, sign, n) <= 99:
            operations.append((sign, n))
            value = calculate(value, sign, n)
    return Sum(start, tuple(operations))


@dataclass(frozen=True)
class Word:
    """One operation of a specification: its words, its Python form and how tightly form and operand must bind."""

    words: str
    form: str
    run: Callable[[int, int], int]
    binds: int  # of the result: 0 sum, 1 product, 2 sign, 3 power, 4 atom
    needs: int  # of the operand: parentheses go around anything that binds less


WORDS = {
    "add": Word("add {n}", "{e}+{n}", lambda x, n: x + n, 0, 0),
    "subtract": Word("subtract {n}", "{e}-{n}", lambda x, n: x - n, 0, 0),
    "times": Word("times {n}", "{e}*{n}", lambda x, n: x * n, 1, 1),
    "double": Word("double", "{e}*2", lambda x, n: x * 2, 1, 1),
    "triple": Word("triple", "{e}*3", lambda x, n: x * 3, 1, 1),
    "square": Word("square", "{e}**2", lambda x, n: x * x, 3, 4),
    "negate": Word("negate", "-{e}", lambda x, n: -x, 2, 3),
    "abs": Word("abs", "abs({e})", lambda x, n: abs(x), 4, 0),
    "max": Word("max with {n}", "max({e},{n})", lambda x, n: max(x, n), 4, 0),
    "min": Word("min with {n}", "min({e},{n})", lambda x, n: min(x, n), 4, 0),
}


@dataclass(frozen=True)
class Spec:
    """A function of one integer, as a chain of operations (word, n)."""

    operations: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return "code:" + " then ".join(WORDS[w].words.format(n=n) for w, n in self.operations) + ":"

    def expression(self, careful: bool = True) -> str:
        """Python lambda; without care the parentheses that precedence asks for are forgotten."""
        text, binds = "x", 4
        for name, n in self.operations:
            word = WORDS[name]
            text = word.form.format(e=f"({text})" if careful and binds < word.needs else text, n=n)
            binds = word.binds
        return f"lambda x:{text}"

    @property
    def solution(self) -> str:
        return self.expression()

    def value(self, x: int) -> int:
        for name, n in self.operations:
            x = WORDS[name].run(x, n)
        return x


def draw_word(rng: random.Random) -> tuple[str, int]:
    name = rng.choice(list(WORDS))
    return name, rng.randint(2, 9) if "{n}" in WORDS[name].words else 0


def draw_spec(rng: random.Random) -> Spec:
    return Spec(tuple(draw_word(rng) for _ in range(STEPS)))


DRAW: dict[str, Callable[[random.Random], Sum | Spec]] = {"math": draw_sum, "code": draw_spec}


def stream(family: str, split: str, rng: random.Random) -> Iterator[Sum | Spec]:
    """Endless items of one split; the generator decides the order, the hash the split."""
    while True:
        item = DRAW[family](rng)
        if split_of(item.prompt) == split:
            yield item


def problem(item: Sum | Spec) -> Problem:
    name = hashlib.sha256(item.prompt.encode()).hexdigest()[:12]
    if isinstance(item, Sum):
        return Problem(id=f"math-{name}", prompt=item.prompt, answer=str(item.values[-1]))
    tests = tuple(Test(input=[x], output=item.value(x)) for x in INPUTS)
    return Problem(id=f"code-{name}", prompt=item.prompt, tests=tests, entry_point="solution")


def items(family: str, split: str, limit: int, seed: int) -> list[Sum | Spec]:
    """The first `limit` distinct items of a split."""
    if split not in SPLITS:
        raise ConfigError(f"split '{split}' of the tiny {family} task: choose one of {', '.join(SPLITS)}")
    found: dict[str, Sum | Spec] = {}
    for item in stream(family, split, random.Random(f"{family}/{split}/{seed}")):
        found.setdefault(item.prompt, item)
        if len(found) >= limit:
            return list(found.values())
    raise AssertionError("stream is endless")


def math_task(split: str = "test", limit: Count = 300, seed: int = 0) -> Task:
    """Arithmetic by steps, graded by the last box."""
    return Task("tiny_math", tuple(map(problem, items("math", split, limit, seed))), "math")


def code_task(split: str = "test", limit: Count = 300, seed: int = 0) -> Task:
    """Words to a Python lambda, graded by running it on eleven inputs."""
    return Task("tiny_code", tuple(map(problem, items("code", split, limit, seed))), "code")
