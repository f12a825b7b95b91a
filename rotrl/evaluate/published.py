r"""Graders as published, for `protocol.grader`: a second verdict beside the strict one, to stand by published scores.

transferability   string equality with the last box (Transferability-of-LLM-Reasoning, arXiv 2507.00432)
deepscaler        what follows </think>, its last box: mathd's normal form or sympy (rllm); deepcoder is the same
archer            the last box: mathd's normal form or sympy
prorl             verl's prime_math: a box or what follows "answer is", also numbers within 1e-4 or a factor of 100
lighteval         math-verify on the first expression that it finds in the text (open_r1, sober_look)

mathd is the normal form of MATH (arXiv 2103.03874), sympy the check of PRM800K (arXiv 2305.20050). On code all of them
take LiveCodeBench's comparison. Written anew from their behaviour; what runs sympy is only for `MathPool`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from rotrl.errors import ConfigError
from rotrl.evaluate.math import last_boxed

_LONGEST = 2000  # characters of an answer that algebra looks at
_TAIL = 20_000  # characters of a completion that lighteval's extraction looks at


@dataclass(frozen=True)
class Rule:
    """`extract` takes the answer from a completion; `same` compares it with the reference, None where the algebra of
    `judge` has to."""

    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool | None]
    judge: str = "sympy"


def rule(name: str) -> Rule:
    """The grader of that name; raises ConfigError that lists them."""
    if name not in RULES:
        raise ConfigError(f"protocol.grader: {name!r} is unknown; null or one of {', '.join(RULES)}")
    return RULES[name]


def after_thought(completion: str) -> str | None:
    """The last box between </think> and the next one; none where the thought is not closed."""
    parts = completion.split("</think>")
    return last_boxed(parts[1]) if len(parts) > 1 else None


def marked(completion: str) -> str | None:
    """verl's prime_math: the last box of what follows the last "answer is", else that text; it needs a digit."""
    text = completion
    for marker in ("answer:", "answer is", "answers are"):
        if (at := text.lower().rfind(marker)) >= 0:
            text = text[at + len(marker) :].strip()
    box = last_boxed(text)
    if box is None and text is completion:
        return None
    found = box if box is not None else text.rpartition(". ")[0] or text.rstrip(".")
    return found if any(letter.isdigit() for letter in found) else None


def tail(completion: str) -> str:
    """What lighteval reads: the text after the thought, or the end of a thought that was not closed."""
    return completion.rpartition("</think>")[2][-_TAIL:]


def equal(given: str, answer: str) -> bool:
    return given == answer.strip()


def same_normal(given: str, answer: str) -> bool | None:
    """Equal in mathd's or PRM800K's normal form; integers and fractions that differ there are different."""
    if mathd(given) == mathd(answer):
        return True
    one, other = normal(given), normal(answer)
    if one == other:
        return True
    whole = [_INTEGER.fullmatch(text) is not None for text in (one, other)]
    if not one or len(given) > _LONGEST or any(whole) or (_FRACTION.fullmatch(one) and _FRACTION.fullmatch(other)):
        return False
    return None


def same_verl(given: str, answer: str) -> bool | None:
    """`same_normal`, or numbers within a relative 1e-4 of each other, of a hundredth or of a hundred times."""
    if same_normal(given, answer):
        return True
    try:
        number, wanted = (float(text.replace(",", "")) for text in (given, answer))
    except ValueError:
        return same_normal(given, answer)
    return any(math.isclose(number, scale * wanted, rel_tol=1e-4) for scale in (0.01, 1.0, 100.0))


RULES = {
    "transferability": Rule(last_boxed, equal),
    "deepscaler": Rule(after_thought, same_normal),
    "deepcoder": Rule(after_thought, same_normal),
    "archer": Rule(last_boxed, same_normal),
    "prorl": Rule(marked, same_verl),
    "lighteval": Rule(tail, lambda given, answer: None, "lighteval"),
}


# The normal form of MATH

_SQRT = re.compile(r"\\sqrt\s*([^{\s])")
_FRAC = re.compile(r"\\frac\s*([^{\s])\s*(\{|[^{\s])")
_SLASH = re.compile(r"(-?\d+)/(-?\d+)")


def mathd(answer: str) -> str:
    r"""MATH's normal form: no spaces, units, degrees, \left, dollars and percents; \frac12, 1/2 and 0.5 as one text."""
    text = answer.strip()
    if inner := re.fullmatch(r"\\text\{(.+?)\}", text):
        text = inner[1].strip()
    for old, new in _DROPPED:
        text = text.replace(old, new)
    if text.count(r"\text{ ") == 1:
        text = text.partition(r"\text{ ")[0]
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    left, sign, right = text.partition("=")
    if sign and "=" not in right and len(left) <= 2:
        text = right
    text = _SQRT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    text = _FRAC.sub(lambda m: rf"\frac{{{m[1]}}}" + (m[2] if m[2] == "{" else f"{{{m[2]}}}"), text)
    if text == "0.5":
        return r"\frac{1}{2}"
    slash = _SLASH.fullmatch(text)
    return rf"\frac{{{int(slash[1])}}}{{{int(slash[2])}}}" if slash else text


_DROPPED = (
    ("\n", ""),
    (r"\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
    (r"\%", ""),
)


# The check of PRM800K

_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"-?\d+.?/0*[1-9]\d*.?")
_COMMAS = re.compile(r"(\d),(\d{3})(?=$|\D)")
_UNITS = re.compile(
    r"(degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(es)?s? *(\^\d+)?"
)
_WORDS = {r"\%": "", "%": "", r"\$": "", "$": "", " or ": " , ", " and ": " , "}
_SCALES = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}


def normal(answer: str) -> str:
    """PRM800K's normal form: lower case, no spaces, units, braces; LaTeX as plain text, 3.0 and 1,000 as integers."""
    text = answer
    if inner := re.fullmatch(r"\\text\{(.+?)\}", text.strip()):
        text = inner[1]
    for old, new in (*_WORDS.items(), *_SCALES.items()):
        text = text.replace(old, new)
    text = re.sub(r"\^ *\\circ|,\\! *", "", _UNITS.sub("", text))
    text = text[1:-1] if text.startswith("{") and text.endswith("}") else text
    text = re.sub(r"- *", "-", plain_text(text) if "\\" in text else text)
    text = re.sub(r"(\d) +(\d)", r"\1+\2", text)
    text = re.sub(r"[ {}]", "", text).lower()
    try:
        number = float(_COMMAS.sub(r"\1\2", text))
    except ValueError:
        return text
    return str(round(number)) if abs(number) < 1e15 and abs(number - round(number)) <= 1e-7 else text


_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_MACROS = ((r"\\[dt]?frac\s*" + _GROUP + r"\s*" + _GROUP, r" \1/\2"), (r"\\sqrt\s*" + _GROUP, r"sqrt(\1)"))
_SIGNS = {r"\pi": "pi", r"\infty": "inf", r"\cup": "U", r"\cdot": "*", r"\times": "*", r"\ ": " ", r"\,": " "}


def plain_text(latex: str) -> str:
    """LaTeX as that check reads it: fractions lose their grouping, macros that it does not know vanish."""
    text = latex
    for pattern, new in _MACROS:
        for _ in range(8):  # from the outside to the inside of nested ones
            text, count = re.subn(pattern, new, text)
            if not count:
                break
    for sign, new in _SIGNS.items():
        text = text.replace(sign, new)
    return re.sub(r"\\[a-zA-Z]+|\\.", "", text).strip()


_HANGS = re.compile(r"\^[{(]|\^\d+\^|\^\d\d")
_SAFE = re.compile(r"[\w\s+\-*/^().,!]*", re.ASCII)


def sympy_equal(given: str, answer: str) -> tuple[str, str]:
    """PRM800K's last step: their difference simplifies to 0, element by element in tuples and intervals."""
    wanted, found = normal(answer), normal(given)
    sides = _elements(wanted), _elements(found)
    same_ends = len(sides[0]) == 1 or (wanted[0], wanted[-1]) == (found[:1], found[-1:])
    right = same_ends and len(sides[0]) == len(sides[1]) and all(map(_same_element, *sides))
    return ("accepted", "") if right else ("wrong answer", f"expected {answer[:60]}, got {given[:60]}")


def _elements(text: str) -> list[str]:
    text = _COMMAS.sub(r"\1\2", text)
    inside = text[1:-1]
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not set("()[]") & set(inside):
        return [item.strip() for item in inside.split(",")]
    return [text]


def _same_element(wanted: str, found: str) -> bool:
    if wanted == found:
        return True
    if (_FRACTION.fullmatch(wanted) and _FRACTION.fullmatch(found)) or (
        (_INTEGER.fullmatch(wanted) is None) != (_INTEGER.fullmatch(found) is None)
    ):
        return False
    text = f"({wanted})-({found})"
    letters = set(filter(str.isalpha, text.replace("sqrt", "").replace("frac", "")))
    # sympy's parser evaluates Python: no quotes, attributes or long names come through here
    if len(letters) > 2 or "_" in text or _HANGS.search(text) or not _SAFE.fullmatch(text):
        return False
    from sympy import simplify
    from sympy.parsing import sympy_parser as parser

    steps = (*parser.standard_transformations, parser.implicit_multiplication_application)
    try:
        return simplify(parser.parse_expr(text.replace("^", "**"), transformations=steps)) == 0
    except Exception:  # whatever it can't read is not equal
        return False


def lighteval_equal(given: str, answer: str) -> tuple[str, str]:
    """lighteval's extractive match: an expression of the text, boxed ones first, against the reference in a box."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    wanted = parse(rf"\boxed{{{answer.strip().strip('$')}}}", [LatexExtractionConfig()], parsing_timeout=None)  # type: ignore[arg-type]
    config = [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    found = parse(given, config, parsing_timeout=None)  # type: ignore[arg-type]
    right = verify(wanted, found, timeout_seconds=None)
    return ("accepted", "") if right else ("wrong answer", f"expected {answer[:60]}")


# LiveCodeBench (arXiv 2403.07974), `testing_util`


def livecodebench_text(expected: str, value: str) -> bool:
    """Stripped lines that are equal as texts or, token by token, as decimal numbers: "007" is 7, 0.1 is 0.10."""
    sides = [[line.strip() for line in text.strip().split("\n")] for text in (expected, value)]
    return len(sides[0]) == len(sides[1]) and all(map(_same_line, *sides))


def _same_line(expected: str, value: str) -> bool:
    if expected == value:
        return True
    try:
        one, other = ([Decimal(token) for token in line.split()] for line in (expected, value))
        return one == other
    except InvalidOperation:
        return False


def livecodebench_value(expected: Any, value: Any) -> bool:
    """Python's equality after a tuple became a list: True is 1, 15.0 is 15, an inner tuple is no list."""
    return (list(value) if isinstance(value, tuple) else value) == expected
