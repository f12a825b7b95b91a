"""Extraction, comparison, and the verdict on golden and on cheating programs at every level."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.evaluate.code import extract_code, grade_code
from rotrl.evaluate.compare import same_text, same_value
from rotrl.evaluate.sandbox import Limits, Sandbox, ladder
from rotrl.evaluate.task import Problem, Test

PROVEN = [level for level, reason in ladder().items() if not reason]
DOUBLE = Problem("double", "Double x.", tests=tuple(Test([x], 2 * x) for x in range(11)), entry_point="solution")
TRIPLE = Problem("triple", "Read n, print 3 n.", tests=(Test("2\n", "6\n"), Test("5\n", "15\n")))
SHORT = Limits(cpu_seconds=0.3, memory_mb=256)


@pytest.fixture(scope="module", params=[*PROVEN, "none"])
def sandbox(request):
    with Sandbox(request.param, workers=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("lambda x: x", "lambda x: x"),
        ("Let me think.</think>lambda x: x", "lambda x: x"),
        ("```python\na = 1\n```\nor better\n```python\na = 2\n```\nDone.", "a = 2\n"),
        ("```python\na = 1\n```\nIt prints\n```\n1\n```\n", "a = 1\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("<think>```python\na = 0\n```</think>\n```py\na = 1\n```", "a = 1\n"),
        ("1. So:\n   ```python\n   a = 1\n   ```\n", "   a = 1\n"),
        ("```python title=x\na = 1", "a = 1"),
        ("````python\na = 1\n````", "a = 1\n"),
        ("```python\n\n```", None),
        ("I thought about it.</think>\n \n", None),
        ("", None),
    ],
)
def test_extraction(completion, code):
    assert extract_code(completion) == code


GOLDEN = {
    "accepted": [
        "lambda x: 2 * x",
        "```python\ndef solution(x):\n    return x + x\n```",
        "solution = lambda x: x * 2.0",
    ],
    "wrong answer": ["lambda x: x", "lambda x: str(2 * x)", "lambda x: [2 * x]", "lambda x: None", "lambda x: True"],
    "runtime error": ["lambda x: 1 // 0", "def other(x): return 2 * x", "lambda: 1", "5", "import absent", "x"],
    "compile error": ["def solution(x) return 2 * x", "The answer is to double it."],
    "no code": ["", "Hm.</think>", "```python\n```"],
    "time limit": ["def solution(x):\n    while True: pass"],
    "memory limit": ["lambda x: [0] * 10**12"],
}


@pytest.mark.parametrize(("word", "completion"), [(word, text) for word, texts in GOLDEN.items() for text in texts])
def test_golden_programs(sandbox, word, completion):
    verdict = grade_code(DOUBLE, completion, sandbox, SHORT)
    assert (verdict.verdict, verdict.correct) == (word, word == "accepted"), verdict
    assert verdict.grader == f"code:{sandbox.level}"


@pytest.mark.parametrize(
    ("program", "word"),
    [
        ("print(3 * int(input()))", "accepted"),
        ("print(3 * float(input()), ' ')", "accepted"),
        ("print(2 * int(input()))", "wrong answer"),
        ("print(3 * int(input()))\nprint()", "accepted"),
        ("print(3 * int(input()))\nprint(1)", "wrong answer"),
        ("pass", "wrong answer"),
        ("print(3 * int(input()))\nraise SystemExit(1)", "runtime error"),
        ("import os\nos.write(1, b'\\xff\\xfe')", "wrong answer"),
        ("print(6)", "wrong answer"),
    ],
)
def test_standard_output(sandbox, program, word):
    assert grade_code(TRIPLE, program, sandbox, SHORT).verdict == word


# Correct programs of shapes that published graders reject; one reads two numbers and prints their sum, or is `add`.
STDIN_SHAPES = {
    "class Solution": "class Solution:\n    def run(self):\n"
    "        print(sum(map(int, input().split())))\nSolution().run()",
    "helper first": "def helper(a):\n    return sum(a)\nprint(helper(map(int, input().split())))",
    "sys.exit()": "import sys\nprint(sum(map(int, input().split())))\nsys.exit()",
    "exit()": "print(sum(map(int, input().split())))\nexit()",
    "sys.stdin.buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "15.0 for 15": "print(float(sum(map(int, input().split()))))",
    "trailing spaces": "print(sum(map(int, input().split())), '  ')",
    "__main__": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "global": "total = 0\ndef go():\n    global total\n    total += sum(map(int, input().split()))\ngo()\nprint(total)",
    "thread": "import threading\ndef f():\n    print(sum(map(int, input().split())))\n"
    "t = threading.Thread(target=f)\nt.start()\nt.join()",
    "no imports": "print(reduce(add, map(int, stdin.readline().split())))",
    "os.write": "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
    "recursion": "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\n"
    "assert f(20000)\nprint(sum(map(int, input().split())))",
}
FUNCTION_SHAPES = {
    "class Solution": "class Solution:\n    def add(self, a: List[int]) -> int:\n        return sum(a)",
    "helper before Solution": "def helper(a):\n    return sum(a)\n"
    "class Solution:\n    def add(self, a): return helper(a)",
    "two classes": "class Node:\n    pass\nclass Solution:\n    def add(self, a): return self.go(a)\n"
    "    def go(self, a): return sum(a)",
    "function": "def add(a):\n    return sum(a)",
    "15.0 for 15": "def add(a):\n    return float(sum(a))",
    "prints too": "def add(a):\n    print(a)\n    return sum(a)",
    "no imports": "@cache\ndef go(n): return n\n"
    "def add(a: Optional[List[int]]):\n    return go(reduce(lambda x, y: x + y, a))",
    "star imports": "from typing import *\nfrom collections import *\ndef add(a: List):\n    return sum(deque(a))",
    "name of the prelude": "class Solution:\n    def add(self, a):\n        count = sum(a)\n        return count",
}
SUM = Problem("sum", "?", tests=(Test("7 8\n", "15\n"), Test("1 2\n", "3\n")))
ADD = Problem("add", "?", tests=(Test([[7, 8]], 15), Test([[1, 2]], 3)), entry_point="add")


@pytest.mark.parametrize(
    ("problem", "program"),
    [(SUM, p) for p in STDIN_SHAPES.values()] + [(ADD, p) for p in FUNCTION_SHAPES.values()],
    ids=[*STDIN_SHAPES, *(f"function: {name}" for name in FUNCTION_SHAPES)],
)
def test_correct_programs_are_accepted_in_every_shape(sandbox, problem, program):
    verdict = grade_code(problem, f"So:\n```python\n{program}\n```", sandbox)
    assert verdict.verdict == "accepted", verdict


def test_a_name_of_the_prelude_is_no_answer(sandbox):
    """`operator.add` is there for programs, not in place of one."""
    assert grade_code(ADD, "x = 1", sandbox).verdict == "runtime error"


CHEATS = {
    "always equal": "class A:\n    def __eq__(self, other): return True\nsolution = lambda x: A()",
    "always equal integer": "class A(int):\n    def __eq__(self, other): return True\nsolution = lambda x: A(2 * x)",
    "always equal text": "class A(str):\n    def __eq__(self, other): return True\nsolution = lambda x: A()",
    "always equal in a list": "class A(list):\n    def __eq__(self, other): return True\nsolution = lambda x: [A()]",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the call": "import os\nsolution = lambda x: os._exit(0)",
    "sys.exit": "import sys\nsolution = lambda x: sys.exit(0)",
    "printed verdict": "print('accepted')\nsolution = lambda x: print('accepted', 'ok', 'PASSED')",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nsolution = lambda x: exit()",
    "excepthook": "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\nsolution = lambda x: 1 // 0",
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'{"status": "accepted"}\'\nsolution = lambda x: 1',
    "patched builtins": "import builtins\nbuiltins.type = lambda x: int\nsolution = lambda x: object()",
    "caller's frame": """
import sys
def solution(x):
    frame = sys._getframe().f_back
    while frame:
        for name in ("output", "expected", "answer", "tests"):
            if name in frame.f_locals: return frame.f_locals[name]
        frame = frame.f_back
""",
    "forged report": """
import json, os, sys
def solution(x):
    frame = sys._getframe()
    while "nonces" not in frame.f_locals: frame = frame.f_back
    for nonce in frame.f_locals["nonces"]:
        for number in range(3, 64):
            try: os.write(number, f'{nonce} {json.dumps({"status": "ok", "value": True})}\\n'.encode())
            except OSError: pass
    os._exit(0)
""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_is_accepted(sandbox, name):
    verdict = grade_code(DOUBLE, CHEATS[name], sandbox, SHORT)
    assert verdict.correct is False, verdict


def test_the_detail_names_the_test_and_both_values(sandbox):
    verdict = grade_code(DOUBLE, "lambda x: min(2 * x, 6)", sandbox, SHORT)
    assert verdict.detail == "test 5 of 11: expected 8, got 6"


def test_a_problem_without_tests_accepts_nothing(sandbox):
    verdict = grade_code(Problem("empty", "?", entry_point="solution"), "lambda x: x", sandbox)
    assert (verdict.verdict, verdict.correct) == ("grader error", None)


@pytest.mark.parametrize(
    ("expected", "value", "equal"),
    [
        (15, 15.0, True),
        (15.0, 15, True),
        (15, 15.0000001, False),
        (0.1, 0.30000000000000004 - 0.2, True),
        (0.5, 0.51, False),
        (1, True, False),
        (True, 1, False),
        (0, None, False),
        (False, None, False),
        (None, None, True),
        ("1", 1, False),
        ([1, 2], [1, 2], True),
        ([1, 2], [2, 1], False),
        ([1, 2], [1, 2, 3], False),
        ([1, True], [1, 1], False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"b": 1}, False),
        ([], {}, False),
        (10**400, 1.5, False),
        (1.5, 10**400, False),
        (1.5, float("nan"), False),
    ],
)
def test_equality_of_values(expected, value, equal):
    assert same_value(expected, value) is equal


@pytest.mark.parametrize(
    ("expected", "value", "equal"),
    [
        ("6\n", "6", True),
        ("1 2\n3\n", " 1  2 \r\n3\n\n", True),
        ("1 2\n3\n", "1\n2 3", False),
        ("15", "15.0", True),
        ("15", "15.0000001", False),
        ("0.333333", "0.3333333333", True),
        ("0.5", "0.51", False),
        ("0101", "101", False),
        ("1000", "1_000", False),
        ("NaN", "nan", False),
        ("Yes", "YES", False),
        ("", "\n", True),
        ("", "x", False),
        ("1" * 1000, "1" * 1000, True),
        ("1e5", "100000", True),
    ],
)
def test_equality_of_output(expected, value, equal):
    assert same_text(expected, value) is equal


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
def test_a_value_equals_itself(value):
    assert same_value(value, value)


@given(json_values, json_values)
def test_equality_never_fails_and_agrees_with_python_where_types_do(one, other):
    if same_value(one, other) and type(one) is type(other) and not isinstance(one, float | list | dict):
        assert one == other


@pytest.mark.parametrize("level", [*PROVEN, "none"])
def test_values_pass_through_the_sandbox_unchanged(level):
    values = [None, True, 0, -(10**30), 0.1, 1e300, "", "é\n\"'\u2028", [], [[1], {}], {"a": [1.5, None]}, {"": "x"}]
    with Sandbox(level, workers=1) as opened:
        outcomes = opened.run("lambda x: x", [Test([value], None) for value in values], "f")
    assert [outcome.value for outcome in outcomes] == values
    assert [type(outcome.value) for outcome in outcomes] == [type(value) for value in values]
