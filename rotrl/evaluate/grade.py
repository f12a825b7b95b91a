"""Grading beside generation: completions go in as they finish, futures of verdicts come out."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields

from rotrl.errors import ConfigError
from rotrl.evaluate.code import grade_code
from rotrl.evaluate.math import MathPool, grade_plain, last_boxed
from rotrl.evaluate.sandbox import Limits, Sandbox, open_sandbox
from rotrl.evaluate.task import Problem, Task
from rotrl.evaluate.verdict import Verdict

_LIMITS = {field.name for field in fields(Limits)}
_SANDBOX = {"minimum", "allow_unsandboxed", "workers"}
_MATH = {"workers", "timeout_seconds", "memory_mb"}


class Grader:
    """A context manager that grades for the given tasks.

    `sandbox`: {minimum, allow_unsandboxed, workers} of `open_sandbox` and the fields of `Limits`; `math`: the
    parameters of `MathPool`. A sandbox is opened on entry, and refused there, where a task needs one; math-verify
    starts with the first answer that is not plain. Leaving kills whatever still runs.
    """

    def __init__(self, tasks: Sequence[Task], *, sandbox: dict | None = None, math: dict | None = None) -> None:
        sandbox, math = dict(sandbox or {}), dict(math or {})
        _check("sandbox", sandbox, _SANDBOX | _LIMITS)
        _check("math", math, _MATH)
        self._limits = Limits(**{key: value for key, value in sandbox.items() if key in _LIMITS})
        self._sandbox_settings = {key: value for key, value in sandbox.items() if key in _SANDBOX}
        self._has_code = any(task.grader == "code" for task in tasks)
        self._sandbox: Sandbox | None = None
        self._math = MathPool(**math)
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def __enter__(self) -> "Grader":
        if self._has_code:
            self._open()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def sandbox_level(self) -> str | None:
        """The level at which code runs, None where no task has code."""
        return self._sandbox.level if self._sandbox is not None else None

    def submit(self, task: Task, problem: Problem, completion: str) -> "Future[Verdict]":
        """Grade one completion. What needs no other process is graded here and now."""
        if task.grader == "code":
            return self._executor("code", self._open().workers).submit(
                grade_code, problem, completion, self._open(), self._limits
            )
        if problem.answer is None:
            return _done(Verdict.of("grader error", "math:box", f"problem {problem.id} has no answer"))
        plain = grade_plain(completion, problem.answer)
        if plain is not None:
            return _done(plain)
        given = last_boxed(completion) or ""
        return self._executor("math", self._math.workers).submit(self._math.grade, given, problem.answer)

    def close(self) -> None:
        for executor in self._threads.values():
            executor.shutdown(wait=False, cancel_futures=True)
        if self._sandbox is not None:
            self._sandbox.close()
        self._math.close()
        for executor in self._threads.values():
            executor.shutdown(wait=True)

    def _open(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = open_sandbox(**self._sandbox_settings)
        return self._sandbox

    def _executor(self, kind: str, workers: int) -> ThreadPoolExecutor:
        if kind not in self._threads:
            self._threads[kind] = ThreadPoolExecutor(workers, thread_name_prefix=f"grade-{kind}")
        return self._threads[kind]


def _check(name: str, settings: dict, allowed: set[str]) -> None:
    if unknown := sorted(settings.keys() - allowed):
        raise ConfigError(f"{name}: unknown key {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}")


def _done(verdict: Verdict) -> "Future[Verdict]":
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future
