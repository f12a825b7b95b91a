"""Grades a completion by running its program in a sandbox and comparing its answers here, outside of it."""

import re
from dataclasses import dataclass, replace
from typing import Any

from rotrl.evaluate.compare import ORACLES, same_python, same_text, same_value
from rotrl.evaluate.published import livecodebench_text, livecodebench_value
from rotrl.evaluate.sandbox import Limits, Outcome, Sandbox, decode, encode
from rotrl.evaluate.task import Problem, Test
from rotrl.evaluate.verdict import UNGRADABLE, Verdict

_FENCE = re.compile(r"^[ \t]*```+[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = {"python", "python3", "py"}


def extract_code(completion: str) -> str | None:
    """The last fenced block after `</think>`, a Python one before any other; else all that follows `</think>`.

    None where nothing is left. A block that was cut before its closing fence counts as it stands.
    """
    answer = completion.rpartition("</think>")[2]
    blocks = _FENCE.findall(answer)
    python = [code for language, code in blocks if language.lower() in _PYTHON]
    code = python[-1] if python else blocks[-1][1] if blocks else answer
    return code if code.strip() else None


def grade_code(
    problem: Problem,
    completion: str,
    sandbox: Sandbox,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    published: bool = False,
) -> Verdict:
    """Accepted where every test passes; the verdict of the first test that does not, else.

    With an entry point the program must define it (a function, or a method of `class Solution`), or be one expression
    that is bound to it (`lambda x: ...`). Without one it reads standard input and its standard output is compared.
    `published` asks for LiveCodeBench's own verdict too; EvalPlus' is the strict one.
    """
    grader = f"code:{sandbox.level}"
    published = published and problem.tolerance is None
    program = extract_code(completion)
    if program is None:
        return Verdict.of("no code", grader, published=False if published else None)
    if not problem.tests:
        return Verdict.of("grader error", grader, f"problem {problem.id} has no tests")
    run = Run(problem, published)
    sandbox.run(program, problem.tests, problem.entry_point, limits, run.goes_on, python=problem.tolerance is not None)
    return run.verdict(grader)


@dataclass
class Run:
    """What came of a program's tests: the first outcome that is not right, and LiveCodeBench's verdict if asked for."""

    problem: Problem
    published: bool
    fault: Outcome | None = None
    number: int = 0
    lenient: bool | None = None

    def __post_init__(self) -> None:
        self.lenient = True if self.published else None

    def goes_on(self, index: int, outcome: Outcome) -> bool:
        """Whether the next test still matters to a verdict."""
        test = self.problem.tests[index]
        if self.fault is None and not (outcome.status == "ok" and self._right(test, outcome.value)):
            self.fault, self.number = outcome, index + 1
        if self.lenient:
            self.lenient = self._tolerated(test, outcome)
        return self.fault is None or bool(self.lenient)

    def verdict(self, grader: str) -> Verdict:
        if self.fault is None:
            return Verdict.of("accepted", grader, published=self.lenient)
        status, detail = self.fault.status, self.fault.detail
        if status == "ok":
            expected = self.problem.tests[self.number - 1].output
            if self.problem.tolerance is not None:
                expected = decode(expected)
            status, detail = "wrong answer", f"expected {_short(expected)}, got {_short(self.fault.value)}"
        where = f"test {self.number} of {len(self.problem.tests)}: "
        return Verdict.of(status, grader, where + detail, published=self.lenient)

    def _right(self, test: Test, value: Any) -> bool:
        problem = self.problem
        if problem.entry_point is None:
            return same_text(test.output, value)
        if problem.tolerance is None:
            return same_value(test.output, value)
        arguments = decode(test.input) if problem.entry_point in ORACLES else []
        expected = decode(test.output)
        return same_python(problem.entry_point, arguments, expected, value, problem.tolerance)

    def _tolerated(self, test: Test, outcome: Outcome) -> bool | None:
        if outcome.status in UNGRADABLE:
            return None
        if self.problem.entry_point is None:  # it also takes what a program wrote before it exited with a code
            return outcome.value is not None and livecodebench_text(test.output, outcome.value)
        return outcome.status == "ok" and livecodebench_value(test.output, outcome.value)


def answered(problem: Problem, sandbox: Sandbox, limits: Limits) -> Problem:
    """The problem with the outputs that its reference program gives, for tests that come without.

    Raises ValueError with the reason where the reference fails.
    """
    outcomes = sandbox.run(problem.reference or "", problem.tests, problem.entry_point, limits, python=True)
    if outcomes[-1].status != "ok":
        raise ValueError(
            f"the reference of {problem.id} fails on test {len(outcomes)}: {outcomes[-1].status} {outcomes[-1].detail}"
        )
    tests = tuple(
        Test(test.input, encode(outcome.value)) for test, outcome in zip(problem.tests, outcomes, strict=True)
    )
    return replace(problem, tests=tests, reference=None)


def _short(value: Any) -> str:
    try:
        text = value.strip() if isinstance(value, str) else repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else f"{text[:57]}..."
