r"""The graders of published protocols: what each takes, told from the strict verdict on the same completions."""

import pytest

from rotrl.errors import ConfigError
from rotrl.evaluate import published as p
from rotrl.evaluate.grade import Grader
from rotrl.evaluate.math import grade_plain, last_boxed
from rotrl.evaluate.math_pool import MathPool
from rotrl.evaluate.task import Problem, Task, Test


@pytest.fixture(scope="module")
def pool():
    with MathPool(workers=1, timeout_seconds=60) as opened:
        yield opened


# (what follows the thought, reference, the graders that accept it)
THOUGHT = "Hm.</think> "
TABLE = [
    (r"\boxed{25}", "25", "transferability deepscaler archer prorl lighteval strict"),
    (r"\boxed{25}", "025", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{24}", "25", ""),
    (r"\boxed{0.5}", r"\frac{1}{2}", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{2/4}", r"\frac{1}{2}", "lighteval strict"),  # PRM800K wants fractions reduced
    (r"\boxed{12\text{ cm}}", "12", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{90^\circ}", "90", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{x=5}", "5", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{2\sqrt{3}+1}", r"1+2\sqrt{3}", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{(1,2)}", "(1, 2)", "deepscaler archer prorl lighteval strict"),
    (r"\boxed{(2,1)}", "(1,2)", ""),
    (r"\boxed{50}", "0.5", "prorl"),  # verl's prime_math takes a hundred times for a percentage
    (r"\boxed{3.14159}", "3.1416", "prorl"),
    (r"The answer is 7.", "7", "prorl lighteval"),
    # math-verify makes a set of boxes that stand together
    (r"\boxed{6} or rather \boxed{7}", "7", "transferability deepscaler archer prorl strict"),
    (r"\boxed{\text{Evelyn}}", "Evelyn", "deepscaler archer lighteval strict"),  # verl wants a digit
    (r"nothing", "7", ""),
]


def accepted(name, completion, answer, pool) -> bool:
    rule = p.rule(name)
    given = rule.extract(completion)
    if given is None:
        return False
    same = rule.same(given, answer)
    return pool.ask(rule.judge, given, answer)[0] == "accepted" if same is None else same


@pytest.mark.parametrize(("text", "answer", "takers"), TABLE)
def test_who_accepts_what(pool, text, answer, takers):
    found = {name for name in p.RULES if name != "deepcoder" and accepted(name, THOUGHT + text, answer, pool)}
    strict = grade_plain(THOUGHT + text, answer) or pool.grade(last_boxed(text) or "", answer)
    assert found | ({"strict"} if strict.correct else set()) == set(takers.split())


def test_only_deepscaler_wants_the_thought_closed(pool):
    found = {name for name in p.RULES if accepted(name, r"<think> \boxed{7}", "7", pool)}
    assert found == {"transferability", "archer", "prorl", "lighteval"}
    assert not accepted("deepscaler", r"\boxed{7}</think> so", "7", pool)


def test_an_unknown_grader_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"protocol\.grader: 'mathd' is unknown; null or one of transferability, "):
        p.rule("mathd")
    with pytest.raises(ConfigError, match=r"protocol\.grader"):
        Grader([], published="mathd")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\tfrac12", "1/2"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("k = 7", "7"),
        (".5", r"\frac{1}{2}"),
        (r"10\%", "10"),
        (r"\$5", "5"),
        (r"\text{ even }", "even"),
        (r"\frac{\sqrt2}{3}", r"\frac{\sqrt{2}}{3}"),
    ],
)
def test_texts_with_one_normal_form_of_mathd(one, other):
    assert p.mathd(one) == p.mathd(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1,234", "1234"), ("3.0", "3"), ("5 cm", "5"), ("7 3/4", "7+3/4"), (r"\frac{1}{2}", "1/2")],
)
def test_texts_with_one_normal_form_of_prm800k(pool, one, other):
    assert p.normal(one) == p.normal(other) or pool.ask("sympy", one, other)[0] == "accepted"


@pytest.mark.parametrize("text", ["__import__('os')", "x.y", "[].a", "9**9", "2^{10}", "a+b+c+d", "'a'", "lambda: 0"])
def test_nothing_but_short_arithmetic_reaches_sympys_parser(monkeypatch, text):
    from sympy.parsing import sympy_parser

    def refuse(*_, **__):
        raise AssertionError(text)

    if text != "9**9":
        monkeypatch.setattr(sympy_parser, "parse_expr", refuse)
    assert p.sympy_equal(text, "1")[0] == "wrong answer"


# LiveCodeBench


@pytest.mark.parametrize(
    ("expected", "value", "tolerated"),
    [
        ("15", "15.0", True),
        ("7", "007", True),
        ("0.10", "0.1", True),
        ("0.1", "0.1000001", False),
        ("Yes", "Yes \n", True),
        ("a b", "a  b", False),
        ("1 2", "1  2", True),
        ("1\n2", "1\n\n2", False),
        ("1 2", "1\n2", False),
        ("nan", "nan", True),
        ("1", "sNaN", False),
        ("yes", "Yes", False),
    ],
)
def test_livecodebenchs_output(expected, value, tolerated):
    assert p.livecodebench_text(expected, value) is tolerated


@pytest.mark.parametrize(
    ("expected", "value", "tolerated"),
    [
        ([1], (1,), True),
        ([[1]], [(1,)], False),
        (True, 1, True),
        (15, 15.0, True),
        (0.3, 0.1 + 0.2, False),
        ([1], [2], False),
    ],
)
def test_livecodebenchs_values(expected, value, tolerated):
    assert p.livecodebench_value(expected, value) is tolerated


# Both verdicts from one grading

MATH = Task("m", (Problem("a", "?", answer=r"\frac{1}{2}"), Problem("b", "?", answer="7")), "math")
CODE = Task(
    "c",
    (
        Problem("out", "?", tests=(Test("1\n", "1\n"), Test("2\n", "2\n"))),
        Problem("call", "?", tests=(Test([1], 1), Test([2], 2)), entry_point="f"),
        Problem("plus", "?", tests=(Test([1], 1),), entry_point="f", tolerance=0.0),
    ),
    "code",
)


@pytest.mark.parametrize(
    ("task", "problem", "completion", "strict", "published"),
    [
        (MATH, 0, r"</think>\boxed{0.5}", "accepted", True),
        (MATH, 0, r"\boxed{0.5}", "accepted", False),
        (MATH, 0, r"</think>\boxed{2/4}", "accepted", False),
        (MATH, 1, r"</think>\boxed{7}", "accepted", True),
        (MATH, 1, r"</think>\boxed{8}", "wrong answer", False),
        (MATH, 1, "7", "no answer", False),
        (CODE, 0, "print(input())", "accepted", True),
        (CODE, 0, "print('00' + input())", "wrong answer", True),
        (CODE, 0, "print(input())\nexit(3)", "runtime error", True),
        (CODE, 0, "print(input())\n1 // 0", "runtime error", False),
        (CODE, 0, "print(min(int(input()), 1))", "wrong answer", False),
        (CODE, 1, "def f(x): return float(x)", "accepted", True),
        (CODE, 1, "def f(x): return (x == 1) or x", "wrong answer", True),
        (CODE, 1, "", "no code", False),
        (CODE, 2, "def f(x): return x", "accepted", None),
    ],
)
def test_the_published_verdict_stands_beside_the_strict_one(task, problem, completion, strict, published):
    with Grader([task], sandbox={"workers": 1}, math={"workers": 1}, published="deepscaler") as grader:
        verdict = grader.submit(task, task.problems[problem], completion).result()
    assert (verdict.verdict, verdict.published) == (strict, published), verdict


def test_without_a_protocols_grader_there_is_no_second_verdict():
    with Grader([MATH]) as grader:
        assert grader.submit(MATH, MATH.problems[1], r"\boxed{7}").result().published is None
