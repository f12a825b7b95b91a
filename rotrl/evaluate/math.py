r"""Grades a completion by the value in its last \boxed{}: integers first, then the text, then math-verify.

math-verify (sympy) can hang or crash on what a model writes, so it runs in spawned processes that can be killed, and
its failures are verdicts of their own, never "wrong answer". Answers that are integers never start it.
"""

import logging
import math
import multiprocessing
import os
import queue
import re
import resource
import signal
import threading
from multiprocessing.connection import Connection

from rotrl.evaluate.verdict import Verdict

_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"([+-]?)([0-9]+)", re.ASCII)
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}((,|\{,\}|,\\!)[0-9]{3})+", re.ASCII)
_LONGEST = 2000  # characters; no answer of a data set has 300
_START_SECONDS = 120.0


def grade_math(completion: str, answer: str, pool: "MathPool | None" = None) -> Verdict:
    """Grade by the last closed box; without a pool an answer that needs math-verify starts one for itself alone."""
    verdict = grade_plain(completion, answer)
    if verdict is not None:
        return verdict
    given = last_boxed(completion) or ""
    if pool is not None:
        return pool.grade(given, answer)
    with MathPool(workers=1) as single:
        return single.grade(given, answer)


def grade_plain(completion: str, answer: str) -> Verdict | None:
    """The verdict where no algebra is needed (no box, two integers, equal texts), None where it is."""
    given = last_boxed(completion)
    if given is None:
        return Verdict.of("no answer", "math:box", r"no closed \boxed{}")
    numbers = _integer(given), _integer(answer)
    if None not in numbers:
        equal = numbers[0] == numbers[1]
        detail = "" if equal else f"expected {answer[:60]}, got {given[:60]}"
        return Verdict.of("accepted" if equal else "wrong answer", "math:integer", detail)
    if _text(given) == _text(answer):
        return Verdict.of("accepted", "math:text")
    if not given or len(given) > _LONGEST:
        return Verdict.of("wrong answer", "math:text", f"an answer of {len(given)} characters")
    return None


def last_boxed(completion: str) -> str | None:
    r"""The content of the closed \boxed{} that begins last, None where there is none. One pass, for any nesting."""
    open_braces: list[int | None] = []
    begin, end = -1, -1
    for match in _BRACES.finditer(completion):
        if match["box"] or match[0] == "{":
            open_braces.append(match.end() if match["box"] else None)
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > begin:
                begin, end = start, match.start()
    return completion[begin:end].strip() if begin >= 0 else None


def _integer(text: str) -> str | None:
    """Sign and digits without leading zeros ("025" is "25", "1,024" is "1024"), as text: int() refuses long ones."""
    text = text.strip().strip("$").strip().removesuffix(".")
    if _GROUPED.fullmatch(text):
        text = re.sub(r"[^0-9+-]", "", text)
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].lstrip("0")
    return ("-" if match[1] == "-" else "") + digits if digits else "0"


def _text(text: str) -> str:
    return "".join(text.strip().strip("$").split())


class MathPool:
    """math-verify in `workers` spawned processes, each started when it is first needed; grade() from any thread.

    An answer that takes longer than `timeout_seconds` of wall time is a "grader timeout", one that ends its process or
    its `memory_mb` a "grader error"; both cost that process only.
    """

    def __init__(self, workers: int | None = None, timeout_seconds: float = 10.0, memory_mb: int = 4096) -> None:
        self.workers = workers or min(len(os.sched_getaffinity(0)), 8)
        self._timeout = timeout_seconds
        self._memory = memory_mb << 20
        self._slots: queue.Queue[_Worker | None] = queue.Queue()
        for _ in range(self.workers):
            self._slots.put(None)
        self._alive: set[_Worker] = set()
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
        """The verdict on the content of a box."""
        worker = self._slots.get()
        try:
            worker = worker or self._start()
            word, detail = worker.ask(given, answer, self._timeout)
        except TimeoutError:
            word, detail = "grader timeout", f"no result in {self._timeout:g} s on {given[:60]!r}"
        except (EOFError, OSError):
            word, detail = "grader error", f"math-verify's process ended on {given[:60]!r}"
        finally:
            if worker is not None and not worker.healthy:
                worker.kill()
                with self._lock:
                    self._alive.discard(worker)
                worker = None
            self._slots.put(worker)
        return Verdict.of(word, "math:verify", detail)

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise EOFError
            worker = _Worker(self._memory, self._timeout)
            self._alive.add(worker)
        return worker


class _Worker:
    def __init__(self, memory: int, timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, memory, timeout), daemon=True)
        self._process.start()
        other.close()
        self._started = False
        self.healthy = True

    def ask(self, given: str, answer: str, seconds: float) -> tuple:
        self.healthy = False  # until the whole exchange went well
        if not self._started:  # imports take seconds that are not the answer's
            self._receive(_START_SECONDS)
            self._started = True
        self._connection.send((given, answer))
        word, detail = self._receive(seconds)
        self.healthy = word != "grader error"
        return word, detail

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _receive(self, seconds: float):
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv()


def _serve(connection: Connection, memory: int, timeout: float) -> None:
    os.environ.clear()  # it reads what a model wrote; it needs no key of ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import math_verify  # noqa: F401

    logging.disable()
    connection.send("ready")
    while True:
        try:
            given, answer = connection.recv()
        except EOFError:
            return
        signal.alarm(math.ceil(timeout) + 5)  # ends a hang in C code even when nobody is left to kill it
        result = _verify(given, answer)
        signal.alarm(0)
        connection.send(result)


def _verify(given: str, answer: str) -> tuple[str, str]:
    from math_verify import LatexExtractionConfig, parse, verify

    # no plain-text extraction: it would take the last number of any text for the answer
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    try:
        expected = parse(rf"\boxed{{{answer.strip().strip('$')}}}", config, parsing_timeout=None)  # type: ignore[arg-type]
        if not expected:
            return "grader error", f"the reference answer {answer[:60]!r} can't be read"
        found = parse(rf"\boxed{{{given}}}", config, parsing_timeout=None)  # type: ignore[arg-type]
        equal = verify(expected, found, timeout_seconds=None)
    except MemoryError:
        return "grader error", f"out of memory on {given[:60]!r}"
    if equal:
        return "accepted", ""
    return "wrong answer", f"expected {answer[:60]}, got {given[:60]}"
