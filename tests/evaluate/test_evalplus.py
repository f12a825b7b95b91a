"""HumanEval+ and MBPP+ in the shape that EvalPlus writes: read, not run; graded outside; no cheat passes."""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import EvaluationError
from rotrl.evaluate.compare import same_python
from rotrl.evaluate.datasets import evalplus
from rotrl.evaluate.grade import Grader
from rotrl.evaluate.sandbox import decode, encode
from rotrl.evaluate.task import Test as Case


def lines(path: Path, found: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


ASSERTION = """import numpy as np

def is_floats(x) -> bool:
    # check if it is float; List[float]; Tuple[float]
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False


def assertion(out, exp, atol):
    exact_match = out == exp

    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match
"""
CHECK = """

{aux}

def check(candidate):
    inputs = {inputs}
    results = {results}
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        {body}
"""
CROSS = """{aux}

{ref}

def check(candidate):
    inputs = {inputs}
    for i, inp in enumerate(inputs):
        assertion(candidate(*inp), ref_func(*inp), 0)
"""
LOOP = """

{aux}

inputs = {inputs}
results = {results}
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion({name}(*inp), exp, {atol})
"""


def human(identity: str, name: str, body: str, test: str, arguments: str = "x") -> dict:
    head = f'from typing import List\n\n\ndef {name}({arguments}):\n    """ About {name}. """\n'
    return {"task_id": identity, "prompt": head, "canonical_solution": body, "entry_point": name, "test": test}


def check(inputs: list, results: list, body: str = "assertion(candidate(*inp), exp, 0)", aux: str = ASSERTION) -> str:
    return CHECK.format(aux=aux, inputs=inputs, results=results, body=body)


POLY = "import math\n\ndef _poly(xs: list, x: float):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n"
HUMAN = [
    human("HumanEval/0", "mean", "    return sum(x) / len(x)\n", check([[[1, 2]], [[0.5]]], [1.5, 0.5])),
    human("HumanEval/1", "pair", "    return (x, [x])\n", check([[1], ["a'"]], [(1, [1]), ("a'", ["a'"])])),
    human(
        "HumanEval/32",
        "find_zero",
        "    return -x[0] / x[1]\n",
        check([[[-10, 2]], [[6, 4]]], [5.0, -1.5], "assert _poly(*candidate(*inp), inp) <= 0.0001", POLY),
    ),
    human(
        "HumanEval/130",
        "tri",
        "    return [2 ** i for i in range(x)]\n",
        CROSS.format(
            aux=ASSERTION, inputs=[[0], [3], [200]], ref="def ref_func(x):\n    return [2 ** i for i in range(x)]"
        ),
    ),
    human(
        "HumanEval/139",
        "big",
        "    return 10 ** x\n",
        check([[1], [5000]], [10, "BIG"]).replace("'BIG'", "1" + "0" * 5000),
    ),
]


def mbpp_row(identity: int, name: str, code: str, inputs: str, results: str, atol: float = 0) -> dict:
    test = LOOP.format(aux=ASSERTION, inputs=inputs, results=results, name=name, atol=atol)
    first = {"task_id": identity, "code": code, "prompt": f"Write a function: {name}.", "source_file": "f.ipynb"}
    return {**first, "test_imports": [], "test_list": [f"assert {name}(1) == 1"], "test": test}


MBPP = [
    mbpp_row(
        2,
        "similar_elements",
        "def helper(t):\n  return set(t)\ndef similar_elements(a, b):\n  return tuple(helper(a) & helper(b))\n",
        "[[(3, 4, 5), (5, 4)], [(1,), ()]]",
        "[(4, 5), ()]",
    ),
    mbpp_row(
        88,
        "freq_count",
        "import collections\ndef freq_count(x):\n  return collections.Counter(x)\n",
        "[[[1, 1, 2]], [[]]]",
        "[Counter({1: 2, 2: 1}), Counter()]",
    ),
    mbpp_row(
        124,
        "angle_complex",
        "def angle_complex(a, b):\n  return abs(a + b)\n",
        "[[1.0, (3+4j)]]",
        "[5.656854249]",
        1e-6,
    ),
    mbpp_row(434, "text_match_three", "import re\ndef text_match_three(x): ...", "[['abbb'], ['ac']]", "[True, False]"),
    mbpp_row(
        115,
        "empty_dit",
        "def empty_dit(x):\n  return all(not d for d in x)\n",
        "[[[{1}, set(), {'a': -1}]], [[inf, -inf]]]",
        "[False, deque([1])]",
    ),
]


@pytest.fixture
def plus(tmp_path):
    humans = evalplus.humaneval(path=lines(tmp_path / "humaneval.jsonl", HUMAN), problems=len(HUMAN))
    return humans, evalplus.mbpp(path=lines(tmp_path / "mbpp.jsonl", MBPP), problems=len(MBPP))


def test_evalplus_tests_are_read_without_being_run(plus):
    humans, basic = plus
    mean, pair, zero, tri, big = humans.problems
    assert (humans.name, basic.name, humans.grader) == ("humaneval", "mbpp", "code")
    assert (mean.id, mean.entry_point, mean.tolerance, mean.reference) == ("HumanEval/0", "mean", 0.0, None)
    assert mean.tests == (Case([[1, 2]], 1.5), Case([[0.5]], 0.5))
    assert "from typing import List\n\n\ndef mean(x):" in mean.prompt
    assert decode(pair.tests[1].output) == ("a'", ["a'"])
    assert zero.tolerance == 0.0001
    assert tri.reference.endswith("for i in range(x)]\n")
    assert [t.output for t in tri.tests] == [None] * 3
    assert decode(big.tests[1].output) == 10**5000
    similar, freq, angle, _, empty = basic.problems
    assert (similar.id, similar.entry_point) == ("2", "similar_elements")
    assert "def similar_elements(a, b):\n```" in similar.prompt
    assert "helper" not in similar.prompt
    assert "assert similar_elements(1) == 1" in similar.prompt
    assert decode(similar.tests[0].input) == [(3, 4, 5), (5, 4)]
    assert decode(freq.tests[0].output) == {1: 2, 2: 1}
    assert (decode(angle.tests[0].input), angle.tolerance) == ([1.0, 3 + 4j], 1e-6)
    assert decode(empty.tests[0].input) == [[{1}, set(), {"a": -1}]]
    assert decode(empty.tests[1].input) == [[float("inf"), -float("inf")]]
    assert empty.reference == MBPP[4]["code"]
    json.dumps([vars(p) for task in plus for p in task.problems], default=vars)  # all of it is plain


SOLUTIONS = [
    (0, 0, "def mean(x):\n    return sum(x) / len(x) + 1e-9", "accepted"),
    (0, 0, "def mean(x):\n    return sum(x) / len(x) + 1e-3", "wrong answer"),
    (0, 1, "def pair(x):\n    return x, [x]", "accepted"),
    (0, 1, "def pair(x):\n    return [x, [x]]", "wrong answer"),
    (0, 2, "def find_zero(x: List):\n    return -x[0] / x[1]", "accepted"),
    (0, 2, "def find_zero(x):\n    return -x[0] / x[1] + 0.1", "wrong answer"),
    (0, 2, "def find_zero(x):\n    return 'zero'", "wrong answer"),
    (0, 3, "def tri(x):\n    return [1 << i for i in range(x)]", "accepted"),
    (0, 3, "def tri(x):\n    return [2.0 ** i for i in range(x)]", "accepted"),
    (0, 3, "def tri(x):\n    return [i for i in range(x)]", "wrong answer"),
    (0, 4, "def big(x):\n    return 10 ** x", "accepted"),
    (0, 4, "def big(x):\n    return 10 ** x + x // 5000", "wrong answer"),
    (1, 0, "def similar_elements(a, b):\n    return [x for x in reversed(a) if x in b]", "accepted"),
    (1, 0, "def similar_elements(a, b):\n    return a", "wrong answer"),
    (1, 1, "from collections import Counter\ndef freq_count(x):\n    return Counter(x)", "accepted"),
    (1, 1, "def freq_count(x):\n    return {v: x.count(v) for v in x}", "accepted"),
    (1, 1, "class C(dict):\n    __eq__ = lambda *_: True\ndef freq_count(x):\n    return C()", "wrong answer"),
    (1, 2, "def angle_complex(a, b):\n    return abs(a + b)", "accepted"),
    (1, 3, "import re\ndef text_match_three(x):\n    return re.search('ab{3}', x)", "accepted"),
    (1, 3, "def text_match_three(x):\n    return 'ab' in x", "accepted"),
    (1, 3, "def text_match_three(x):\n    return x", "wrong answer"),
    (1, 4, "def empty_dit(x):\n    return not any(x)", "accepted"),
    (1, 4, "def empty_dit(x):\n    return False if len(x) == 3 else None", "wrong answer"),
]
CHEATS = [
    "import os\nos._exit(0)",
    "import sys\ndef {name}(*a):\n    sys.exit(0)",
    "class A:\n    __eq__ = __le__ = lambda *_: True\ndef {name}(*a):\n    return A()",
    "class A(tuple):\n    __eq__ = lambda *_: True\n    __hash__ = lambda self: 0\ndef {name}(*a):\n    return A()",
    """
import sys
def {name}(*a):
    frame = sys._getframe()
    while frame:
        for name in ("exp", "results", "expected"):
            if name in frame.f_locals: return frame.f_locals[name]
        frame = frame.f_back
""",
    "def assertion(*a): pass\ndef check(*a): pass\ndef {name}(*a): return None",
    "import builtins\nbuiltins.zip = lambda *a: []\nbuiltins.enumerate = lambda *a: []\ndef {name}(*a): pass",
]


def test_solutions_of_evalplus_problems(plus):
    with Grader(plus, sandbox={"workers": 1, "cpu_seconds": 2}) as grader:
        for task, problem, program, word in SOLUTIONS:
            verdict = grader.submit(plus[task], plus[task].problems[problem], f"```python\n{program}\n```").result()
            assert verdict.verdict == word, (program, verdict)
            assert verdict.published is None


def test_no_cheat_passes_evalplus_problems(plus):
    with Grader(plus, sandbox={"workers": 1, "cpu_seconds": 2}) as grader:
        for task in plus:
            for problem in task.problems:
                for cheat in CHEATS:
                    program = cheat.replace("{name}", problem.entry_point)
                    assert grader.submit(task, problem, program).result().correct is False, (problem.id, cheat)


def test_a_reference_that_fails_is_the_graders_fault(tmp_path):
    row = {**HUMAN[3], "canonical_solution": "    return 1 // 0\n"}
    task = evalplus.humaneval(path=lines(tmp_path / "h.jsonl", [row]), problems=1)
    with Grader([task], sandbox={"workers": 1}) as grader:
        verdict = grader.submit(task, task.problems[0], "def tri(x): return []").result()
    assert (verdict.verdict, verdict.correct) == ("grader error", None)
    assert "the reference of HumanEval/130 fails on test 1" in verdict.detail


@pytest.mark.parametrize(
    ("load", "row", "other", "message"),
    [
        (evalplus.humaneval, HUMAN[0], {"test": "def check(:"}, "field test: no Python program"),
        (evalplus.humaneval, HUMAN[0], {"test": "METADATA = {}"}, "field test: no loop over literal inputs"),
        (evalplus.humaneval, HUMAN[0], {"test": check([[1]], [1, 2])}, "field test: 1 inputs and 2 results"),
        (evalplus.humaneval, HUMAN[0], {"test": check([], [])}, "field test: 0 inputs"),
        (evalplus.humaneval, HUMAN[0], {"test": check([open], [1])}, "field test: no"),
        (evalplus.humaneval, HUMAN[0], {"entry_point": "a b"}, "the tests call 'a b'"),
        (evalplus.mbpp, MBPP[0], {"code": "def other(a): pass"}, "field code: it does not define similar_elements"),
        (evalplus.mbpp, MBPP[0], {"code": "def"}, "field code: no Python program"),
        (evalplus.mbpp, MBPP[0], {"test": MBPP[0]["test"].replace("(*inp), exp", "(*inp)")}, "field test: no loop"),
        (evalplus.mbpp, MBPP[0], {"test_list": None}, "test_list missing"),
    ],
)
def test_a_broken_evalplus_row_is_named_by_file_row_and_field(tmp_path, load, row, other, message):
    file = lines(tmp_path / "rows.jsonl", [{**row, **other}])
    with pytest.raises(EvaluationError) as error:
        load(path=file, problems=1)
    assert f"{file}, row 1" in str(error.value)
    assert message in str(error.value)


def test_evalplus_sets_are_read_from_parquet_too_and_counted(tmp_path, plus):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(MBPP), tmp_path / "mbpp.parquet")
    assert evalplus.mbpp(path=tmp_path / "mbpp.parquet", problems=len(MBPP)).problems == plus[1].problems
    with pytest.raises(EvaluationError, match=r"found 5 rows, expected 378"):
        evalplus.mbpp(path=tmp_path / "mbpp.parquet")
    assert len(evalplus.humaneval(path=tmp_path / "humaneval.jsonl", limit=2).problems) == 2


# Equality and the way of values

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "arguments", "expected", "value", "tolerance", "equal"),
    [
        ("f", [], 1, 1.0, 0, True),
        ("f", [], True, 1, 0, True),  # Python's equality, as EvalPlus has it
        ("f", [], (1, 2), [1, 2], 0, False),
        ("f", [], [1, 2], [1, 2 + 1e-7], 0, False),
        ("f", [], [1.0, 2.0], [1.0, 2.0 + 1e-7], 0, True),
        ("f", [], [1.0, 2], [1.0, 2 + 1e-7], 0, False),
        ("f", [], 1.0, 1.0 + 1e-5, 0, False),
        ("f", [], 1e9, 1e9 + 50, 0, True),  # rtol 1e-7
        ("f", [], 1.0, 1, 0.5, True),
        ("f", [], 1, 1.2, 0.5, False),  # another type
        ("f", [], 1.0, 1.2, 0.5, True),
        ("f", [], [[1.0], [2.0]], [[1.0], [2.1]], 0.5, True),
        ("f", [], [1.0], [1.0, 2.0], 0.5, False),
        ("f", [], 1 + 2j, 1 + 2.0000001j, 1e-6, True),
        ("f", [], INF, INF, 0, True),
        ("f", [], INF, 1.0, 0, False),
        ("f", [], 1.0, INF, 0, False),
        ("f", [], NAN, NAN, 0, False),
        ("f", [], "a", "b", 0.5, False),
        ("f", [], [], [], 0, True),
        ("f", [], None, 0, 0, False),
        ("Diff", [], [1, 2], (2, 1, 1), 0, True),
        ("Diff", [], [1, 2], [[1], 2], 0, False),
        ("Diff", [], [1, 2], 3, 0, False),
        ("check_str", [], True, "match", 0, True),
        ("check_str", [], False, None, 0, True),
        ("check_str", [], True, False, 0, False),
        ("are_equivalent", [], True, None, 0, True),
        ("sum_div", [4], 3, 0, 0, True),
        ("sum_div", [4], 3, 4, 0, False),
        ("surface_Area", [3, 4], 33, 34, 0, False),
        ("surface_Area", [6, 4], 84, 96, 0, True),
        ("digit_distance_nums", [1, 100], 0, 2, 0, True),
        ("find_zero", [[-4, 0, 1]], 2.0, -2.0, 1e-4, True),
        ("find_zero", [[-4, 0, 1]], 2.0, 1e300, 1e-4, False),
        ("find_zero", [[-4, 0, 1]], 2.0, [2.0], 1e-4, False),
    ],
)
def test_the_rules_of_evalplus(name, arguments, expected, value, tolerance, equal):
    assert same_python(name, arguments, expected, value, tolerance) is equal


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
plain |= st.complex_numbers(allow_nan=False, allow_infinity=False)
keys = st.recursive(plain, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
python_values = st.recursive(
    keys,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner)
        | st.sets(keys, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(python_values)
def test_values_travel_as_json_and_come_back_equal(value):
    assert decode(json.loads(json.dumps(encode(value)))) == value


@given(python_values)
def test_a_literal_is_read_as_it_was_written(value):
    assert evalplus.value(ast.parse(repr(value), mode="eval").body) == value


@pytest.mark.parametrize("found", [{}, {"tuple": 1}, {"set": [[1]]}, {"int": 5}, {"complex": ["a"]}, {"a": 1, "b": 2}])
def test_json_that_is_no_value_is_refused(found):
    with pytest.raises(ValueError):  # noqa: PT011
        decode(found)


def test_keys_that_could_be_made_to_collide_are_limited():
    assert len(decode({"set": list(range(10_000))})) == 10_000
    with pytest.raises(ValueError, match="more than 10000 keys"):
        decode([{"set": list(range(6000))}, {"dict": [[i, 0] for i in range(6000)]}])


def test_another_type_is_equal_to_nothing():
    assert decode(encode(object())) != decode(encode(object()))
    assert repr(decode(encode([Path()]))) == "[<pathlib.PosixPath>]"
