"""Grading beside generation: completions go in as they finish, futures of verdicts come out."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace

from rotrl.errors import ConfigError
from rotrl.evaluate.code import answered, grade_code
from rotrl.evaluate.math import grade_plain, last_boxed
from rotrl.evaluate.math_pool import MathPool
from rotrl.evaluate.published import rule
from rotrl.evaluate.sandbox import Limits, Sandbox, open_sandbox
from rotrl.evaluate.task import Problem, Task
from rotrl.evaluate.verdict import UNGRADABLE, Verdict

_LIMITS = {field.name for field in fields(Limits)}
_SANDBOX = {"minimum", "allow_unsandboxed", "workers"}
_MATH = {"workers", "timeout_seconds", "memory_mb"}


class Grader:
    """A context manager that grades for the given tasks.

    `sandbox`: {minimum, allow_unsandboxed, workers} of `open_sandbox` and the fields of `Limits`; `math`: the
    parameters of `MathPool`; `published`: the name of a protocol's own grader, whose verdict then stands beside the
    strict one. A sandbox is opened on entry, and refused there, where a task needs one; math-verify starts with the
    first answer that is not plain. Leaving kills whatever still runs.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        sandbox: dict | None = None,
        math: dict | None = None,
        published: str | None = None,
    ) -> None:
        sandbox, math = dict(sandbox or {}), dict(math or {})
        _check("sandbox", sandbox, _SANDBOX | _LIMITS)
        _check("math", math, _MATH)
        self._rule = rule(published) if published is not None else None
        self._limits = Limits(**{key: value for key, value in sandbox.items() if key in _LIMITS})
        self._sandbox_settings = {key: value for key, value in sandbox.items() if key in _SANDBOX}
        self._has_code = any(task.grader == "code" for task in tasks)
        self._sandbox: Sandbox | None = None
        self._math = MathPool(**math)
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._answered: dict[tuple[str, str], Problem] = {}
        self._answering = threading.Lock()

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
            return self._executor("code", self._open().workers).submit(self._code, task, problem, completion)
        if problem.answer is None:
            return _done(Verdict.of("grader error", "math:box", f"problem {problem.id} has no answer"))
        strict, found = grade_plain(completion, problem.answer), self._published(completion, problem.answer)
        if strict is not None and not isinstance(found, str):
            return _done(replace(strict, published=found))
        return self._executor("math", self._math.workers).submit(
            self._algebra, strict, found, completion, problem.answer
        )

    def close(self) -> None:
        for executor in self._threads.values():
            executor.shutdown(wait=False, cancel_futures=True)
        if self._sandbox is not None:
            self._sandbox.close()
        self._math.close()
        for executor in self._threads.values():
            executor.shutdown(wait=True)

    def _code(self, task: Task, problem: Problem, completion: str) -> Verdict:
        sandbox = self._open()
        if problem.reference is not None:
            key = (task.name, problem.id)
            try:
                with self._answering:
                    if key not in self._answered:
                        self._answered[key] = answered(problem, sandbox, self._limits)
            except ValueError as error:
                return Verdict.of("grader error", f"code:{sandbox.level}", str(error))
            problem = self._answered[key]
        return grade_code(problem, completion, sandbox, self._limits, published=self._rule is not None)

    def _published(self, completion: str, answer: str) -> bool | str | None:
        """The protocol's own verdict, or the answer that algebra has to judge for it."""
        if self._rule is None:
            return None
        given = self._rule.extract(completion)
        if given is None:
            return False
        same = self._rule.same(given, answer)
        return given if same is None else same

    def _algebra(self, strict: Verdict | None, found: bool | str | None, completion: str, answer: str) -> Verdict:
        strict = strict or self._math.grade(last_boxed(completion) or "", answer)
        if self._rule is not None and isinstance(found, str):
            word, _ = self._math.ask(self._rule.judge, found, answer)
            found = None if word in UNGRADABLE else word == "accepted"
        return replace(strict, published=found)

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
