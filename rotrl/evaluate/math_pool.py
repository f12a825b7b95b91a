"""Computer algebra in processes that can be killed: it can hang or crash on what a model writes."""

import logging
import multiprocessing
import os
import queue
import resource
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from rotrl.evaluate.math import verify
from rotrl.evaluate.published import lighteval_equal, sympy_equal
from rotrl.evaluate.verdict import UNGRADABLE, Verdict

_START_SECONDS = 120.0
_PATIENCE = 6  # wall seconds for each CPU second: a worker waits for generation, which goes before it

JUDGES: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "verify": verify,
    "sympy": sympy_equal,
    "lighteval": lighteval_equal,
}


class MathPool:
    """`workers` spawned processes, each started when it is first needed; usable from any thread.

    An answer that takes more than `timeout_seconds` of CPU time is a "grader timeout", one that ends its process or its
    `memory_mb` a "grader error"; both cost that process only. The same answer to the same reference is judged once.
    """

    def __init__(self, workers: int | None = None, timeout_seconds: float = 10.0, memory_mb: int = 4096) -> None:
        self.workers = workers or min(len(os.sched_getaffinity(0)), 8)
        self._timeout = timeout_seconds
        self._memory = memory_mb << 20
        self._slots: queue.Queue[_Worker | None] = queue.LifoQueue()  # the started one before a new one
        for _ in range(self.workers):
            self._slots.put(None)
        self._alive: set[_Worker] = set()
        self._known: dict[tuple[str, str, str], tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> "MathPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self._alive:
                worker.kill()
            self._alive.clear()

    def grade(self, given: str, answer: str) -> Verdict:
        """math-verify's verdict on the content of a box."""
        word, detail = self.ask("verify", given, answer)
        return Verdict.of(word, "math:verify", detail)

    def ask(self, judge: str, given: str, answer: str) -> tuple[str, str]:
        """A verdict's word and detail from one of JUDGES."""
        key = (judge, given, answer)
        if key not in self._known:
            found = self._ask(*key)
            if found[0] in UNGRADABLE:
                return found
            self._known[key] = found
        return self._known[key]

    def _ask(self, judge: str, given: str, answer: str) -> tuple[str, str]:
        worker = self._slots.get()
        try:
            worker = worker or self._start()
            return worker.ask((judge, given, answer, self._timeout), _PATIENCE * self._timeout)
        except TimeoutError:
            return "grader timeout", f"no result in {self._timeout:g} s on {given[:60]!r}"
        except (EOFError, OSError):
            return "grader error", f"the algebra's process ended on {given[:60]!r}"
        finally:
            if worker is not None and not worker.healthy:
                worker.kill()
                with self._lock:
                    self._alive.discard(worker)
                worker = None
            self._slots.put(worker)

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise EOFError
            worker = _Worker(self._memory)
            self._alive.add(worker)
        return worker


class _Worker:
    def __init__(self, memory: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, memory), daemon=True)
        self._process.start()
        other.close()
        self._started = False
        self.healthy = True

    def ask(self, question: tuple[str, str, str, float], seconds: float) -> tuple[str, str]:
        """TimeoutError where its CPU time or these wall seconds are over."""
        self.healthy = False  # until the whole exchange went well
        if not self._started:  # imports take seconds that are not the answer's
            self._receive(_START_SECONDS)
            self._started = True
        self._connection.send(question)
        try:
            word, detail = self._receive(seconds)
        except EOFError:
            self._process.join(1)
            if self._process.exitcode == -signal.SIGPROF:
                raise TimeoutError from None
            raise
        self.healthy = word not in UNGRADABLE
        return word, detail

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _receive(self, seconds: float):
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv()


def _serve(connection: Connection, memory: int) -> None:
    os.nice(10)  # grading goes on beside generation, which must not wait for it
    os.environ.clear()  # it reads what a model wrote; it needs no key of ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _two_stage_parser()
    logging.disable()
    connection.send("ready")
    while True:
        try:
            judge, given, answer, seconds = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time; no handler: it ends a hang in C code too
        result = JUDGES[judge](given, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(result)


def _two_stage_parser() -> None:
    """ANTLR's advice for speed: SLL prediction first, full LL where that meets a syntax error; the trees are the same.

    Tuples, intervals and equations take 2 ms instead of 20.
    """
    import latex2sympy2_extended.latex2sympy2 as latex
    import math_verify  # noqa: F401
    from antlr4.atn.PredictionMode import PredictionMode

    class TwoStage(latex.PSParser):
        def math(self):
            self._interp.predictionMode = PredictionMode.SLL
            try:
                return super().math()
            except Exception:  # the error listener raises just that
                self.reset()
                self._interp.predictionMode = PredictionMode.LL
                return super().math()

    latex.PSParser = TwoStage
