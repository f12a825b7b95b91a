"""Outcomes of programs, limits, recovery, and the choice of the level. Attacks are in test_sandbox_attacks.py."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate.sandbox import LEVELS, Limits, Sandbox, ladder, open_sandbox, probe
from rotrl.evaluate.sandbox.canary import breaches
from rotrl.evaluate.sandbox.inside import syscalls
from rotrl.evaluate.task import Test

PROVEN = [level for level, reason in ladder().items() if not reason]
SHORT = Limits(cpu_seconds=0.3, wall_seconds=20, memory_mb=256, output_mb=1)


@pytest.fixture(scope="module", params=[*PROVEN, "none"])
def sandbox(request):
    with Sandbox(request.param, workers=2) as opened:
        yield opened


def numbers(*inputs):
    return [Test([value], None) for value in inputs]


def test_a_function_answers_every_test_in_order(sandbox):
    outcomes = sandbox.run("def twice(x):\n    return [x, 2 * x]", numbers(1, 2, 3), "twice")
    assert [outcome.value for outcome in outcomes] == [[1, 2], [2, 4], [3, 6]]


def test_a_bare_expression_is_bound_to_the_entry_point(sandbox):
    assert sandbox.run("  lambda x: x + 1\n", numbers(4), "solution")[0].value == 5


def test_a_method_of_class_solution_is_found(sandbox):
    program = "class Solution:\n    def twice(self, x):\n        return 2 * x"
    assert sandbox.run(program, numbers(4), "twice")[0].value == 8


@pytest.mark.parametrize(
    "program",
    [
        "n = int(input())\nprint(n + int(input()))",
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))\nsys.exit()",
        "print(sum(map(int, open(0).read().split())))\nexit()",
        "import os\ndata = os.read(0, os.fstat(0).st_size)\nprint(sum(map(int, data.split())))\nquit(0)",
        "import sys, threading\nf = lambda: print(sum(map(int, sys.stdin)))\nthreading.Thread(target=f).start()",
        "if __name__ == '__main__':\n    import os\n    print(3 + 4, flush=True)\n    os._exit(0)",
        "import atexit\natexit.register(lambda: print(7))",
    ],
    ids=["input", "buffer", "open0", "fstat", "thread", "os._exit", "atexit"],
)
def test_standard_input_in_the_shapes_that_people_write(sandbox, program):
    [outcome] = sandbox.run(program, [Test("3\n4\n", None)], None)
    assert (outcome.status, outcome.value) == ("ok", "7\n")


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("def f(x:\n", "compile error"),
        ("f = '\0'", "compile error"),
        ("f = " + "(" * 5000, "compile error"),
        ("def f(x):\n    return 1 // 0", "runtime error"),
        ("def g(x):\n    return 1", "runtime error"),
        ("raise ValueError('at import')", "runtime error"),
        ("import sys\nsys.exit(0)", "runtime error"),
        ("import os\ndef f(x):\n    os._exit(0)", "runtime error"),
        ("def f(x):\n    return f(x + 1)", "runtime error"),
        ("import ctypes\ndef f(x):\n    return ctypes.string_at(0)", "runtime error"),
        ("def f(x):\n    return bytearray(100 << 30)", "memory limit"),
        ("def f(x):\n    rows = []\n    while True:\n        rows.append(' ' * 10**7)", "memory limit"),
        ("def f(x):\n    while True: pass", "time limit"),
    ],
)
def test_each_failure_has_its_own_status(sandbox, program, status):
    outcomes = sandbox.run(program, numbers(1, 2), "f", SHORT)
    assert [outcome.status for outcome in outcomes] == [status], outcomes
    assert sandbox.run("lambda x: x", numbers(1), "f")[0].value == 1


def test_a_sleeping_program_ends_by_the_wall_clock(sandbox):
    [outcome] = sandbox.run("import time\ntime.sleep(1000)", [Test("", None)], None, Limits(wall_seconds=0.3))
    assert (outcome.status, outcome.detail) == ("time limit", "it was still there after 0.3 s")


def test_the_time_limit_is_that_of_one_test_not_of_all(sandbox):
    program = """
import time
def f(x):
    end = time.process_time() + 0.2
    while time.process_time() < end: pass
    return x
"""
    outcomes = sandbox.run(program, numbers(1, 2, 3), "f", SHORT)
    assert [outcome.value for outcome in outcomes] == [1, 2, 3]


def test_a_slow_test_after_fast_ones_is_named(sandbox):
    outcomes = sandbox.run("def f(x):\n    while x == 3: pass\n    return x", numbers(1, 2, 3, 4), "f", SHORT)
    assert [outcome.status for outcome in outcomes] == ["ok", "ok", "time limit"]


def test_a_run_ends_at_the_first_outcome_that_is_not_accepted(sandbox):
    tests = [Test(str(index), None) for index in range(5)]
    outcomes = sandbox.run("print(input())", tests, None, accept=lambda index, outcome: index < 1)
    assert [outcome.value for outcome in outcomes] == ["0\n", "1\n"]


def test_programs_see_the_same_random_numbers_and_set_order_every_time(sandbox):
    program = "import random\ndef f(x):\n    return [random.random(), list({str(i) for i in range(50)})]"
    with Sandbox(sandbox.level, workers=1) as other:
        assert sandbox.run(program, numbers(1), "f") == other.run(program, numbers(1), "f")


def test_the_library_is_there(sandbox):
    program = """
def f(x):
    import csv, sqlite3, unittest, xml.sax, zoneinfo
    return 'é'.encode('cp1252').hex()
"""
    assert sandbox.run(program, numbers(1), "f")[0].value == "e9"


def test_a_dead_server_is_replaced(sandbox):
    for server in list(sandbox._servers):
        os.killpg(server._process.pid, signal.SIGKILL)
    for _ in range(4):
        assert sandbox.run("lambda x: x", numbers(1), "f")[0].value == 1


def test_close_ends_a_running_program_at_once(sandbox):
    with Sandbox(sandbox.level, workers=1) as other:
        found = []
        limits = Limits(cpu_seconds=100, wall_seconds=100)
        thread = threading.Thread(
            target=lambda: found.extend(other.run("while True: pass", [Test("", None)], None, limits))
        )
        thread.start()
        time.sleep(0.3)
        started = time.monotonic()
    thread.join(5)
    assert time.monotonic() - started < 5
    assert [outcome.status for outcome in found] == ["sandbox error"]


def test_the_strongest_level_that_holds_is_opened():
    with open_sandbox(workers=1) as opened:
        assert opened.level == probe() == (PROVEN or ["none"])[0]


def test_the_canary_names_what_goes_through_without_a_sandbox():
    with Sandbox("none", workers=1) as opened:
        assert "read a file, write a file" in breaches(opened)


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="none, landlock, bubblewrap"):
        open_sandbox(minimum="docker")


# in a process where the kernel has no Landlock and the path no bubblewrap
_BARE = """
import ctypes, struct
code = b"".join(struct.pack("<HBBI", *line) for line in [
    (0x20, 0, 0, 0), (0x35, 0, 2, 444), (0x25, 1, 0, 446), (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7FFF0000)])
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0
from rotrl.errors import EvaluationError
from rotrl.evaluate.sandbox import open_sandbox
from rotrl.evaluate.task import Test
try:
    open_sandbox(workers=1)
except EvaluationError as error:
    print(error)
with open_sandbox(workers=1, allow_unsandboxed=True) as opened:
    print(opened.level, opened.run("lambda x: x", [Test([5], None)], "f")[0].value)
"""


def test_without_any_sandbox_code_is_refused_unless_that_is_asked_for_by_name():
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", _BARE], env=environment, capture_output=True, text=True, check=True)
    refusal, opened = run.stdout.splitlines()
    assert "bwrap is not installed" in refusal
    assert "Landlock is not available" in refusal
    assert "allow_unsandboxed=true" in refusal
    assert opened == "none 5"


def _filter(machine, number, arguments=(0,) * 6, arch=None):
    """A seccomp filter, interpreted by the book: the returned action."""
    code = syscalls.bpf(machine)
    data = {0: number, 4: syscalls.MACHINES[machine][0] if arch is None else arch}
    for index, argument in enumerate(arguments):
        data |= {16 + 8 * index: argument & 0xFFFFFFFF, 20 + 8 * index: argument >> 32}
    at = accumulator = 0
    while True:
        operation = int.from_bytes(code[at : at + 2], "little")
        constant = int.from_bytes(code[at + 4 : at + 8], "little")
        jump = 0
        if operation == 0x20:
            accumulator = data[constant]
        elif operation == 0x54:
            accumulator &= constant
        elif operation == 0x15:
            jump = code[at + 2] if accumulator == constant else code[at + 3]
        else:
            assert operation == 0x06
            return constant
        at += 8 * (1 + jump)


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine):
    column = syscalls.MACHINES[machine][1]
    listed = {numbers[column]: name for name, numbers in syscalls.ALLOWED.items() if numbers[column] is not None}
    for number in [*range(600), 0x4000_0000, 0xFFFF_FFFF]:
        name = listed.get(number)
        if name not in syscalls.GUARDED:
            assert _filter(machine, number) == (0x7FFF_0000 if name else 0x0005_0026), (number, name)
    for name, (index, _, values) in syscalls.GUARDED.items():
        for value, action in [*((value, 0x7FFF_0000) for value in values), (0x7E01_0000, 0x0005_0026)]:
            arguments = [0] * 6
            arguments[index] = value
            assert _filter(machine, syscalls.ALLOWED[name][column], arguments) == action
    assert _filter(machine, 0, arch=0x4000_0003) == 0x8000_0000
    dangerous = {"fork", "vfork", "clone3", "execve", "socket", "kill", "tgkill", "ptrace", "mount", "unshare", "bpf"}
    assert not dangerous & syscalls.ALLOWED.keys()


def test_levels_are_ordered_from_weak_to_strong():
    assert LEVELS == ("none", "landlock", "bubblewrap")


def test_refusal_below_the_minimum_names_the_level(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EvaluationError, match=r"level bubblewrap or above.*bwrap is not installed"):
        open_sandbox(minimum="bubblewrap", workers=1)
