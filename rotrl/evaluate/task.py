"""A task is a list of problems and the way their answers are graded; `custom` reads one from a user's JSONL."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.values import Count

GRADERS = ("math", "code")


@dataclass(frozen=True)
class Test:
    """One test of a program: with an entry point a list of arguments and a JSON value, else stdin and stdout text."""

    __test__ = False  # pytest takes every class of this name for tests

    input: Any
    output: Any


@dataclass(frozen=True)
class Problem:
    """`prompt` is the user's message, before any chat template. `answer` is for math, `tests` for code.

    With a `tolerance` the tests hold Python values as `sandbox.encode` writes them, compared by EvalPlus' rules; a
    `reference` program then gives the outputs of tests that come without.
    """

    id: str
    prompt: str
    answer: str | None = None
    tests: tuple[Test, ...] = ()
    entry_point: str | None = None
    tolerance: float | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Task:
    name: str
    problems: tuple[Problem, ...]
    grader: str

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise EvaluationError(f"task {self.name}: grader {self.grader!r} is unknown; choose one of {GRADERS}")
        if not self.problems:
            raise EvaluationError(f"task {self.name}: it has no problems")
        seen: set[str] = set()
        for problem in self.problems:
            if problem.id in seen:
                raise EvaluationError(f"task {self.name}: problem id {problem.id!r} occurs twice; ids must be unique")
            seen.add(problem.id)


def custom(path: str | Path | None, name: str | None = None, limit: Count | None = None) -> Task:
    """Read a user's task, one JSON object a line.

    Math: {id, prompt or problem, answer}. Code: {id, prompt or problem, tests: [{input, output}], entry_point?}; with
    entry_point a test's input is the list of arguments and its output a JSON value, without it both are text
    (stdin, stdout). Raises EvaluationError with the file, the line and the field at fault.
    """
    if path is None:
        raise EvaluationError("no problems were given; set evaluation.path to a JSONL file")
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # U+2028 is text inside JSON
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: can't be read as UTF-8 text ({error}); give the path of a JSONL file") from None
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        problem = _problem(line, f"{file}, line {number}")
        if problem.id in first_line:
            raise EvaluationError(
                f"{file}, line {number}, field id: {problem.id!r} was used on line {first_line[problem.id]}; "
                "make ids unique"
            )
        first_line[problem.id] = number
        if problems and bool(problem.tests) != bool(problems[0].tests):
            raise EvaluationError(f"{file}, line {number}: math (answer) and code (tests) are mixed; use two files")
        problems.append(problem)
    if not problems:
        raise EvaluationError(f"{file}: no problems in it; write one JSON object {{id, prompt, answer}} a line")
    return Task(name or file.stem, tuple(problems[:limit]), "code" if problems[0].tests else "math")


def _problem(line: str, where: str) -> Problem:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise EvaluationError(f"{where}: found a {type(row).__name__}, expected an object {{id, prompt, answer}}")
    for key, kind in (("id", int), ("answer", int | float)):
        if isinstance(row.get(key), kind) and not isinstance(row[key], bool):
            row[key] = str(row[key])
    prompt_key = "problem" if "problem" in row and "prompt" not in row else "prompt"
    for key in ("id", prompt_key):
        _require(row, key, where)
    if ("answer" in row) == ("tests" in row):
        raise EvaluationError(f"{where}: give exactly one of answer (math) and tests (code)")
    if "answer" in row:
        _require(row, "answer", where)
        return Problem(row["id"], row[prompt_key], answer=row["answer"])
    entry_point = row.get("entry_point")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise EvaluationError(f"{where}, field entry_point: {entry_point!r} is not the name of a function")
    return Problem(row["id"], row[prompt_key], tests=_tests(row["tests"], entry_point, where), entry_point=entry_point)


def _require(row: dict, key: str, where: str) -> None:
    if key not in row:
        raise EvaluationError(f"{where}, field {key}: missing; the line has {sorted(row)}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise EvaluationError(f"{where}, field {key}: found {row[key]!r}, expected a text that is not empty")


def _tests(rows: Any, entry_point: str | None, where: str) -> tuple[Test, ...]:
    if not isinstance(rows, list) or not rows:
        raise EvaluationError(f"{where}, field tests: found {rows!r}, expected a list of {{input, output}}")
    tests = []
    for index, row in enumerate(rows):
        place = f"{where}, field tests[{index}]"
        if not isinstance(row, dict) or not {"input", "output"} <= row.keys():
            raise EvaluationError(f"{place}: expected an object with input and output")
        if entry_point is not None and not isinstance(row["input"], list):
            raise EvaluationError(f"{place}.input: with entry_point it must be the list of arguments")
        if entry_point is None:
            for key in ("input", "output"):
                if not isinstance(row[key], str):
                    raise EvaluationError(f"{place}.{key}: without entry_point it must be text (stdin, stdout)")
        tests.append(Test(row["input"], row["output"]))
    return tuple(tests)
