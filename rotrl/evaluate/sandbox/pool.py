"""Many fork servers as one sandbox: programs in, outcomes out, from any thread."""

import contextlib
import json
import os
import queue
import secrets
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rotrl.evaluate.sandbox.inside.values import decode
from rotrl.evaluate.sandbox.server import Ending, Limits, SandboxFault, Server
from rotrl.evaluate.task import Test

_CHILD_MAY_SAY = {"ok", "wrong answer", "memory limit", "runtime error", "compile error"}


@dataclass(frozen=True)
class Outcome:
    """What a program made of one test. `value` is what its function returned, or the text of its standard output even
    where it exited with a code."""

    status: str
    value: Any = None
    detail: str = ""


class Sandbox:
    """`workers` fork servers at one level; a context manager whose end kills them and what they run."""

    def __init__(self, level: str, workers: int) -> None:
        self.level = level
        self.workers = workers
        self._idle: queue.Queue[Server] = queue.Queue()
        self._servers: set[Server] = set()
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._closed = False
        try:
            servers = [self._start() for _ in range(workers)]
            for server in servers:
                server.handshake()
                self._idle.put(server)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            servers = list(self._servers)
        for server in servers:
            server.kill()

    def run(
        self,
        program: str,
        tests: Sequence[Test],
        entry_point: str | None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        accept: Callable[[int, Outcome], bool] = lambda index, outcome: outcome.status == "ok",
        python: bool = False,
    ) -> list[Outcome]:
        """One outcome a test, in order, up to the first that `accept` refuses.

        Only the tests' inputs leave this process; `python` says that they are `encode`d. With an entry point one
        process answers as many tests as its CPU limit allows, and the test at which it ended starts anew with a whole
        limit; without one each test has its own.
        """
        outcomes: list[Outcome] = []
        while len(outcomes) < len(tests):
            step = len(tests) if entry_point is not None else len(outcomes) + 1
            inputs = [test.input for test in tests[len(outcomes) : step]]
            found = self._attempt(program, inputs, entry_point, limits, python)
            if found[0].status == "time limit":  # the machine may have been busy
                found = self._attempt(program, inputs, entry_point, limits, python, alone=True)
            if len(found) > 1 and found[-1].status == "time limit":
                found.pop()
            for outcome in found:
                outcomes.append(outcome)
                if not accept(len(outcomes) - 1, outcome):
                    return outcomes
        return outcomes

    def _attempt(
        self, program: str, inputs: list, entry_point: str | None, limits: Limits, python: bool, alone: bool = False
    ) -> list[Outcome]:
        """One process; a server that fails is started anew once before its failure is the outcome."""
        with contextlib.ExitStack() as stack:
            if alone:
                stack.enter_context(self._alone)
                for _ in range(self.workers - 1):
                    stack.callback(self._idle.put, self._idle.get())
            server = self._idle.get()
            try:
                try:
                    return _one_process(server, program, inputs, entry_point, limits, python)
                except SandboxFault:
                    server = self._restart(server)
                    return _one_process(server, program, inputs, entry_point, limits, python)
            except SandboxFault as fault:
                return [Outcome("sandbox error", detail=str(fault))]
            finally:
                self._idle.put(server)

    def _restart(self, dead: Server) -> Server:
        dead.kill()
        server = self._start()
        try:
            server.handshake()
        except SandboxFault:
            server.kill()
            raise
        with self._lock:
            self._servers.discard(dead)
        return server

    def _start(self) -> Server:
        with self._lock:
            if self._closed:
                raise SandboxFault("the sandbox is closed")
            server = Server(self.level)
            self._servers.add(server)
            return server


def _one_process(
    server: Server, program: str, inputs: list, entry_point: str | None, limits: Limits, python: bool
) -> list[Outcome]:
    nonces = [secrets.token_hex(8) for _ in inputs]
    request = {"program": program, "entry_point": entry_point, "inputs": inputs, "nonces": nonces, "python": python}
    with contextlib.ExitStack() as stack:

        def file(content: str = "") -> int:  # in memory, so that neither side ever waits for the other to read
            descriptor = os.memfd_create("rotrl", os.MFD_CLOEXEC)
            stack.callback(os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as stream:
                stream.write(content.encode(errors="replace"))
            os.lseek(descriptor, 0, os.SEEK_SET)
            return descriptor

        report = file()
        standard_input, output = file(inputs[0] if entry_point is None else ""), file()
        ending = server.run((file(json.dumps(request)), report, standard_input, output), limits)
        answers = _answers(_content(report, limits), set(nonces))
        if entry_point is None:
            fault = answers.get(nonces[0])
            text = _content(output, limits).decode(errors="replace")
            if ending.exit == 0:
                return [Outcome("ok", text)]
            ended = _ended(ending, limits, fault)
            return [replace(ended, value=text) if ending.exit is not None and fault is None else ended]
    outcomes = []
    for nonce in nonces:
        answer = answers.get(nonce)
        if answer is None or answer["status"] != "ok":
            return [*outcomes, _ended(ending, limits, answer)]
        try:
            outcomes.append(Outcome("ok", decode(answer.get("value"))))
        except ValueError as error:
            return [*outcomes, Outcome("wrong answer", detail=f"the result can't be read: {error}")]
    return outcomes


def _content(descriptor: int, limits: Limits) -> bytes:
    with open(descriptor, "rb", closefd=False) as stream:
        stream.seek(0)
        return stream.read(limits.output_mb << 20)


def _answers(report: bytes, nonces: set[str]) -> dict[str, dict]:
    """The lines that carry one of the nonces; anything else in the report is noise that the program made."""
    answers: dict[str, dict] = {}
    for line in report.split(b"\n"):
        nonce, _, text = line.partition(b" ")
        if (key := nonce.decode(errors="replace")) not in nonces:
            continue
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(answer, dict) and answer.get("status") in _CHILD_MAY_SAY:
            answers[key] = answer
    return answers


def _ended(ending: Ending, limits: Limits, fault: dict | None) -> Outcome:
    """The outcome of the test at which a program stopped. What the kernel says comes before what the child says."""
    if ending.late == "wall":
        return Outcome("time limit", detail=f"it was still there after {limits.wall_seconds:g} s")
    if ending.late == "cpu" or (ending.signal == signal.SIGKILL and ending.cpu_seconds > limits.cpu_seconds):
        return Outcome("time limit", detail=f"more than {limits.cpu_seconds:g} CPU seconds")
    if ending.signal == signal.SIGKILL:
        return Outcome("memory limit", detail="the kernel ended it for its memory")
    if fault is not None and fault["status"] != "ok":
        return Outcome(fault["status"], detail=str(fault.get("detail", ""))[:200])
    if ending.signal is not None:
        return Outcome("runtime error", detail=f"ended by signal {ending.signal} ({signal.strsignal(ending.signal)})")
    if ending.exit == 0:
        return Outcome("runtime error", detail="it ended before it answered")
    return Outcome("runtime error", detail=f"exit code {ending.exit}")
