"""Grades a completion by running its program in a sandbox and comparing its answers here, outside of it."""

import json
import math
import re
from decimal import Decimal
from typing import Any

from rotrl.evaluate.sandbox import Limits, Outcome, Sandbox
from rotrl.evaluate.task import Problem
from rotrl.evaluate.verdict import Verdict

_FENCE = re.compile(r"^[ \t]*```+[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = {"python", "python3", "py"}
# no leading zeros: "0101" and "101" are different texts, not one number
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]{0,300})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_TOLERANCE = 1e-6


def extract_code(completion: str) -> str | None:
    """The last fenced block after `</think>`, a Python one before any other; else all that follows `</think>`.

    None where nothing is left. A block that was cut before its closing fence counts as it stands.
    """
    answer = completion.rpartition("</think>")[2]
    blocks = _FENCE.findall(answer)
    python = [code for language, code in blocks if language.lower() in _PYTHON]
    code = python[-1] if python else blocks[-1][1] if blocks else answer
    return code if code.strip() else None


def grade_code(problem: Problem, completion: str, sandbox: Sandbox, limits: Limits = Limits()) -> Verdict:  # noqa: B008
    """Accepted where every test passes; the verdict of the first test that does not, else.

    With an entry point the program must define it (a function, or a method of `class Solution`), or be one expression
    that is bound to it (`lambda x: ...`). Without one it reads standard input and its standard output is compared.
    """
    grader = f"code:{sandbox.level}"
    program = extract_code(completion)
    if program is None:
        return Verdict.of("no code", grader)
    if not problem.tests:
        return Verdict.of("grader error", grader, f"problem {problem.id} has no tests")
    same = same_value if problem.entry_point is not None else same_text

    def passes(index: int, outcome: Outcome) -> bool:
        return outcome.status == "ok" and same(problem.tests[index].output, outcome.value)

    outcomes = sandbox.run(program, problem.tests, problem.entry_point, limits, accept=passes)
    last, count = outcomes[-1], len(outcomes)
    if count == len(problem.tests) and passes(count - 1, last):
        return Verdict.of("accepted", grader)
    where = f"test {count} of {len(problem.tests)}: "
    if last.status == "ok":
        return Verdict.of(
            "wrong answer",
            grader,
            where + f"expected {_short(problem.tests[count - 1].output)}, got {_short(last.value)}",
        )
    return Verdict.of(last.status, grader, where + last.detail)


def same_value(expected: Any, value: Any) -> bool:
    """Equality of JSON values: numbers by value (15.0 is 15), a truth value is no number, order counts in lists.

    Where the expected number is a float, 1e-6 relative or absolute is allowed; an expected integer is met exactly.
    """
    if isinstance(expected, bool) or isinstance(value, bool) or expected is None or value is None:
        return type(expected) is type(value) and expected == value
    if isinstance(expected, int | float) and isinstance(value, int | float):
        return expected == value or (isinstance(expected, float) and _close(expected, value))
    if isinstance(expected, list | tuple) and isinstance(value, list):
        return len(expected) == len(value) and all(map(same_value, expected, value))
    if isinstance(expected, dict) and isinstance(value, dict):
        return expected.keys() == value.keys() and all(same_value(expected[key], value[key]) for key in expected)
    return isinstance(expected, str) and isinstance(value, str) and expected == value


def same_text(expected: str, value: str) -> bool:
    """Equality of output line by line and token by token; white space around lines and text is ignored.

    Tokens that differ as text are equal as numbers by the rule of `same_value`.
    """
    lines, other = ([line.split() for line in text.strip().split("\n")] for text in (expected, value))
    return len(lines) == len(other) and all(
        len(line) == len(given) and all(map(_same_token, line, given)) for line, given in zip(lines, other, strict=True)
    )


def _same_token(expected: str, value: str) -> bool:
    if expected == value:
        return True
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(value)):
        return False
    number, given = Decimal(expected), Decimal(value)
    return number == given or ("." in expected and _close(float(number), float(given)))


def _close(expected: float, value: float) -> bool:
    try:
        return math.isclose(expected, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    except OverflowError:  # an integer beyond every float
        return False


def _short(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
