"""The facade: futures of verdicts, settings, laziness, and an end that leaves nothing."""

import multiprocessing
import os
import time

import pytest

from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate.grade import Grader
from rotrl.evaluate.sandbox import probe
from rotrl.evaluate.task import Problem, Task, Test
from rotrl.evaluate.verdict import UNGRADABLE, WORDS, Verdict

MATH = Task("sums", (Problem("sum", "3+4", answer="7"), Problem("half", "1/2", answer=r"\frac{1}{2}")), "math")
CODE = Task("programs", (Problem("inc", "Add 1.", tests=(Test([1], 2), Test([5], 6)), entry_point="solution"),), "code")
ANY = {"allow_unsandboxed": True, "workers": 2}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_verdicts_of_mixed_tasks_arrive_as_futures():
    with Grader([MATH, CODE], sandbox=ANY, math={"workers": 1, "timeout_seconds": 60}) as grader:
        assert grader.sandbox_level == (probe() if probe() != "none" else "none")
        code = [grader.submit(CODE, CODE.problems[0], f"lambda x: x + {step}") for step in (1, 2) * 10]
        sums = [grader.submit(MATH, MATH.problems[0], rf"\boxed{{{value}}}") for value in (7, 8)]
        assert all(future.done() for future in sums)
        half = grader.submit(MATH, MATH.problems[1], r"so \boxed{0.5}")
        assert [future.result().correct for future in code] == [True, False] * 10
        assert [future.result().correct for future in sums] == [True, False]
        assert half.result().grader == "math:verify"
        assert half.result().correct


def test_integers_start_no_process():
    before = set(multiprocessing.active_children())
    with Grader([MATH]) as grader:
        assert grader.submit(MATH, MATH.problems[0], r"\boxed{007}").result().correct
        assert grader.submit(MATH, MATH.problems[0], "no box").result().verdict == "no answer"
        assert grader.sandbox_level is None
        assert set(multiprocessing.active_children()) == before


def test_leaving_ends_what_still_runs():
    settings = {**ANY, "cpu_seconds": 1000, "wall_seconds": 1000}
    with Grader([MATH, CODE], sandbox=settings, math={"workers": 1, "timeout_seconds": 1000}) as grader:
        loops = [grader.submit(CODE, CODE.problems[0], "def solution(x):\n    while True: pass") for _ in range(6)]
        tower = grader.submit(MATH, MATH.problems[1], r"\boxed{9^{9^{9^{9}}}}")
        time.sleep(0.5)
        servers = [server._process.pid for server in grader._sandbox._servers]
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert all(future.cancelled() or future.result().correct is None for future in [*loops, tower])
    assert not any(alive(pid) for pid in servers)


def test_a_sandbox_below_the_minimum_is_refused_on_entry(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EvaluationError, match="bwrap is not installed"):
        Grader([CODE], sandbox={"minimum": "bubblewrap"}).__enter__()
    with Grader([MATH], sandbox={"minimum": "bubblewrap"}) as grader:  # nothing to run, nothing to refuse
        assert grader.sandbox_level is None


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match=r"sandbox: unknown key cpu; allowed are .*cpu_seconds"):
        Grader([CODE], sandbox={"cpu": 3})
    with pytest.raises(ConfigError, match="math: unknown key timeout"):
        Grader([MATH], math={"timeout": 3})


def test_a_graders_failure_is_neither_right_nor_wrong():
    for word in WORDS:
        correct = Verdict.of(word, "test").correct
        assert (correct is None) == (word in UNGRADABLE)
        assert bool(correct) == (word == "accepted")
    with pytest.raises(ValueError, match="no verdict"):
        Verdict.of("right", "test")
