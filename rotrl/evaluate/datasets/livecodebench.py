"""LiveCodeBench (arXiv 2403.07974): dated contest problems, so that a window can lie after a model's training.

_target_: rotrl.evaluate.datasets.livecodebench.livecodebench
release: release_v5   # cumulative: v1 400, v2 511, v3 612, v4 713, v5 880, v6 1055 problems
start: 2024-08-01     # start <= contest_date < end
end: 2025-02-01
problems: 279         # in the window, asserted; null: any number
"""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.evaluate.datasets.hidden import hidden_tests
from rotrl.evaluate.datasets.source import Benchmark, Source, draw, fill, locate, read
from rotrl.evaluate.task import Problem, Test
from rotrl.values import Count

REPO = "livecodebench/code_generation_lite"
REVISION = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"

# What each release added, in order; the loading script of the repository does not run any more.
FILES: Mapping[str, int | None] = {
    "test.jsonl": 400,
    "test2.jsonl": 111,
    "test3.jsonl": 101,
    "test4.jsonl": 101,
    "test5.jsonl": 167,
    "test6.jsonl": 175,
}
# Both were published by then: for a later window 2 GB need not be fetched.
PUBLISHED = {"test.jsonl": date(2024, 7, 1), "test2.jsonl": date(2024, 7, 1)}
FIELDS = ("question_id", "question_content", "contest_date", "public_test_cases", "private_test_cases", "metadata")

PROMPT = "Solve this problem with an efficient Python 3 program.\n\n{problem}\n\n{format}"
STDIN = (
    "The program reads standard input and prints its answer to standard output. Give the whole program in one block:\n"
    "```python\n# your program\n```"
)
FUNCTIONAL = (
    "Complete this starter code, keeping its names, and give the whole program in one block:\n```python\n{starter}\n```"
)


def livecodebench(
    *,
    path: str | Path | None = None,
    revision: str | None = REVISION,
    release: str = "release_v5",
    start: str | None = "2024-08-01",
    end: str | None = "2025-02-01",
    prompt: str | None = None,
    problems: Count | None = 279,
    limit: Count | None = None,
    name: str = "livecodebench",
    files: Mapping[str, int | None] = FILES,
) -> Benchmark:
    """Problems of `release` with start <= contest_date < end, each with its public and its hidden tests.

    A window's problems depend on the release: release_v6 adds problems of January 2025 to the 279 of release_v5.
    `files` is for copies in other pieces: {file: rows}. Raises EvaluationError for counts and fields that differ.
    """
    source = Source(name, REPO, FIELDS)
    first, last = _date(start, f"{source.key}.start"), _date(end, f"{source.key}.end")
    chosen = {
        file: count
        for file, count in _released(release, files, source.key).items()
        if not (first and file in PUBLISHED and PUBLISHED[file] <= first)
    }
    origin, local = locate(source, path, revision, chosen)
    found: list[Problem] = []
    for place, row in read(source, local):
        day = _date(row["contest_date"], f"{place}, field contest_date")
        if day and (not first or first <= day) and (not last or day < last):
            found.append(_problem(row, place, prompt or PROMPT, source.key))
            if len(found) == limit:
                break
    else:
        if problems is not None and len(found) != problems:
            raise EvaluationError(
                f"{source.key}: found {len(found)} problems of {release} in [{start}, {end}), expected {problems}; "
                f"for another window set {source.key}.problems={len(found)}"
            )
    return Benchmark(name, tuple(found), "code", f"{origin} {release} [{start}, {end})")


def training_prompts(
    *,
    path: str | Path | None = None,
    revision: str | None = REVISION,
    release: str = "release_v2",
    prompt: str | None = None,
    limit: Count | None = None,
    seed: int = 0,
    files: Mapping[str, int | None] = FILES,
) -> Benchmark:
    """Prompts without tests, to sample a code expert on: release_v2 (2023-05 to 2024-05) is what DeepCoder trained on.

    `limit` draws that many at random by `seed`.
    """
    source = Source("livecodebench_training", REPO, FIELDS, "models.prompts.EXPERT")
    origin, local = locate(source, path, revision, _released(release, files, source.key))
    found = [_problem(row, place, prompt or PROMPT, source.key, tests=False) for place, row in read(source, local)]
    return Benchmark(source.name, draw(found, limit, seed), "code", f"{origin} {release}")


def _released(release: str, files: Mapping[str, int | None], key: str) -> dict[str, int | None]:
    names = {f"release_v{number}": number for number in range(1, len(files) + 1)}
    if release not in names:
        raise EvaluationError(f"{key}.release: {release!r} is unknown; one of {', '.join(names)}")
    return dict(list(files.items())[: names[release]])


def _date(value: Any, place: str) -> date | None:
    """The day of `2024-08-03T00:00:00`, a date or a datetime; None stays None."""
    if value is None:
        return None
    try:
        return date.fromisoformat(str(value)[:10])
    except ValueError:
        raise EvaluationError(f"{place}: {value!r} is no date; write it as 2024-08-01") from None


def _problem(row: dict[str, Any], place: str, prompt: str, key: str, tests: bool = True) -> Problem:
    place = f"{place} ({row['question_id']})"
    entry_point = _json(row["metadata"], f"{place}, field metadata").get("func_name")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise EvaluationError(f"{place}, field metadata: func_name {entry_point!r} is not the name of a function")
    text = STDIN
    if entry_point:
        starter = row.get("starter_code") or f"def {entry_point}(...):"
        text = FUNCTIONAL.replace("{starter}", starter.strip("\n"))
    return Problem(
        str(row["question_id"]),
        fill(prompt, key, problem=row["question_content"], format=text),
        tests=_tests(row, entry_point is not None, place) if tests else (),
        entry_point=entry_point,
    )


def _tests(row: dict[str, Any], functional: bool, place: str) -> tuple[Test, ...]:
    """Functional tests hold one JSON value a line for the arguments and one for the result."""
    public = _json(row["public_test_cases"], f"{place}, field public_test_cases")
    listed = [*public, *hidden_tests(row["private_test_cases"], place)]
    tests = []
    for number, test in enumerate(listed):
        given, wanted = (test.get("input"), test.get("output")) if isinstance(test, dict) else (None, None)
        if not isinstance(given, str) or not isinstance(wanted, str):
            raise EvaluationError(f"{place}, test {number}: input and output must be texts")
        if functional:
            where = f"{place}, test {number}"
            tests.append(Test([_json(line, where) for line in given.split("\n")], _json(wanted, where)))
        else:
            tests.append(Test(given, wanted))
    if not tests:
        raise EvaluationError(f"{place}: it has no tests, so every program would pass")
    return tuple(tests)


def _json(text: Any, place: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{place}: not JSON ({error})") from None
