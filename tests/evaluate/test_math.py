"""Boxes, integers and texts without algebra; pairs through math-verify; what hangs or crashes costs its limit only."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.evaluate.math import grade_plain, last_boxed
from rotrl.evaluate.math_pool import MathPool


@pytest.fixture(scope="module")
def pool():
    with MathPool(workers=1, timeout_seconds=60) as opened:
        yield opened


@pytest.mark.parametrize(
    ("completion", "box"),
    [
        (r"so \boxed{14}.", "14"),
        (r"first \boxed{1}, then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x \boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"} } \boxed{3}", "3"),
        (r"{ \boxed{3}", "3"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_last_closed_box(completion, box):
    assert last_boxed(completion) == box


def test_a_million_braces_cost_one_pass():
    started = time.process_time()
    assert last_boxed("\\boxed{" * 200_000) is None
    assert last_boxed("{" * 500_000 + "\\boxed{1}" + "}" * 500_000) == "1"
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("given", "answer", "word", "grader"),
    [
        ("25", "025", "accepted", "math:integer"),
        ("025", "25", "accepted", "math:integer"),
        ("-0", "0", "accepted", "math:integer"),
        ("+7", "7", "accepted", "math:integer"),
        ("-7", "7", "wrong answer", "math:integer"),
        ("24", "25", "wrong answer", "math:integer"),
        ("1,024", "1024", "accepted", "math:integer"),
        (r"1{,}024", "1024", "accepted", "math:integer"),
        (r"$25$", "25", "accepted", "math:integer"),
        ("25.", "25", "accepted", "math:integer"),
        ("9" * 5000, "9" * 5000, "accepted", "math:integer"),
        (r"\frac12", r"\frac 1 2".replace(" ", ""), "accepted", "math:text"),
        ("( 1, 2 )", "(1,2)", "accepted", "math:text"),
        ("", "5", "wrong answer", "math:text"),
        ("1+" * 2000 + "1", "5", "wrong answer", "math:text"),
    ],
)
def test_plain_answers_need_no_algebra(given, answer, word, grader):
    verdict = grade_plain(rf"\boxed{{{given}}}", answer)
    assert verdict is not None
    assert (verdict.verdict, verdict.grader, verdict.correct) == (word, grader, word == "accepted")


def test_no_box_is_no_answer():
    verdict = grade_plain("The answer is 5.", "5")
    assert verdict is not None
    assert (verdict.verdict, verdict.correct) == ("no answer", False)


@given(st.integers(), st.integers(), st.integers(0, 3))
def test_integers_compare_as_integers(one, other, zeros):
    sign, digits = ("-", str(one)[1:]) if one < 0 else ("", str(one))
    verdict = grade_plain(rf"\boxed{{{sign}{'0' * zeros}{digits}}}", str(other))
    assert verdict is not None
    assert verdict.correct == (one == other)


EQUAL = [
    ("1/2", "0.5"),
    (r"\dfrac{1}{2}", r"\frac12"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("5.0", "5"),
    (r"\frac{4}{2}", "2"),
    ("2^3", "8"),
    ("x=5", "5"),
    ("7*2=14", "14"),
    (r"90^\circ", "90"),
    (r"12\text{ cm}", "12"),
    (r"\{2,1\}", r"\{1,2\}"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\text{(C)}", r"\text{C}"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"6 - 5i", "6-5i"),
    (r"(-\infty, 2) \cup (3,\infty)", r"(-\infty,2)\cup(3,\infty)"),
    ("2, 1", "1,2"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"\$18.90", "18.90"),
    (r"10,080", "10080.0"),
    (r"\frac{3}{4}\pi", r"\frac{3\pi}{4}"),
    ("2x+y=3", "2x + y = 3"),
    (r"\left[-2, 7\right)", "[-2,7)"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"),
    ("5.4 cents", "5.4"),
]
UNEQUAL = [
    ("0.333", "1/3"),
    ("(2,1)", "(1,2)"),
    ("[0,1]", "[0,1)"),
    ("3.14", r"\pi"),
    ("3,4", "3"),
    ("3+4", "8"),
    ("x+1", "x+2"),
    ("the answer is 5", "5"),
    ("1-", "1"),
    (r"\frac{", "5"),
    ("sixteen", "16"),
    (r"\frac{3}{56}", r"\frac{3}{55}"),
    (r"\sqrt{2}", "1.414"),
    ("[1,2]", "(1,2)"),
    (r"(-\infty, 2)", r"(-\infty, 2]"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\text{even}", r"\text{odd}"),
    ("6+5i", "6-5i"),
    (r"\pm 2", "2"),
]


# as references these would mean something else or nothing
ONE_WAY = {"1-", r"\frac{", "the answer is 5", "sixteen", "7*2=14"}
PAIRS = [(*pair, True) for pair in EQUAL] + [(*pair, False) for pair in UNEQUAL]
PAIRS += [(answer, given, correct) for given, answer, correct in PAIRS if given not in ONE_WAY]


@pytest.mark.parametrize(("given", "answer", "correct"), PAIRS)
def test_pairs(pool, given, answer, correct):
    verdict = grade_plain(rf"\boxed{{{given}}}", answer) or pool.grade(given, answer)
    assert verdict.correct is correct, verdict


def test_a_reference_that_cannot_be_read_is_the_graders_fault(pool):
    verdict = pool.grade("5", " ")
    assert (verdict.verdict, verdict.correct) == ("grader error", None)


def test_hang_and_crash_are_verdicts_of_their_own_and_cost_only_themselves(pool):
    assert pool.grade("1/8", "0.125").correct
    pool._timeout, before = 0.5, pool._timeout
    verdict = pool.grade("9^{9^{9^{9}}}", "5")
    assert (verdict.verdict, verdict.correct) == ("grader timeout", None)
    pool._timeout = before
    assert pool.grade("3/8", "0.375").correct
    [worker] = pool._alive
    worker._process.kill()
    verdict = pool.grade("5/8", "0.5")
    assert (verdict.verdict, verdict.correct) == ("grader error", None)
    assert pool.grade("7/8", "0.875").correct


def test_a_hang_costs_its_cpu_limit_and_leaves_the_other_worker_alone():
    with MathPool(workers=2, timeout_seconds=1.0) as pool, ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda p: pool.grade(*p).correct, [("1/2", "0.5"), ("1/4", "0.25")])) == [True, True]
        hang = threads.submit(pool.grade, "9^{9^{9^{9}}}", "5")
        assert all(pool.grade(f"{n}/2", f"{n}.0/2").correct for n in range(1, 99, 2))
        assert hang.result().verdict == "grader timeout"


def test_the_same_question_is_judged_once_and_a_failure_again(pool):
    assert pool.grade("1/16", "0.0625").correct
    [worker] = pool._alive
    worker._process.kill()
    assert pool.grade("1/16", "0.0625").correct
    assert pool.grade("9/16", "0.0625").correct is None
    assert pool.grade("9/16", "0.0625").correct is False


ADVERSARIAL = [
    "2^{3^{4^{5^{6}}}}",
    "1" * 1_000_000,
    "{" * 20_000 + "1" + "}" * 20_000,
    r"\frac{" * 250 + "1" + "}{2}" * 250,
    "(" * 900 + "1" + ")" * 900,
    r"\left" * 300,
    "999999999999!",
    r"\begin{pmatrix}" * 100,
    "\0\n\u2028\ud83d",
    "1" * 1999,
]


def test_adversarial_answers_are_not_accepted_and_the_pool_survives_them():
    with MathPool(workers=1, timeout_seconds=0.5) as pool:
        for given in ADVERSARIAL:
            verdict = grade_plain(rf"\boxed{{{given}}}", r"\sqrt{7}") or pool.grade(given, r"\sqrt{7}")
            assert not verdict.correct, given[:20]
        pool._timeout = 60
        assert pool.grade("1/2", "0.5").correct


def test_a_closed_pool_leaves_no_process_and_no_verdict():
    opened = MathPool(workers=2)
    opened.close()
    assert opened.grade("1/2", "0.5").verdict == "grader error"
