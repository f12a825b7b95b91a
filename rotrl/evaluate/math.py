r"""Grades a completion by the value in its last \boxed{}: integers first, then the text, then math-verify.

math-verify (sympy) can hang or crash on what a model writes, so `verify` runs in the processes of `MathPool`, and its
failures are verdicts of their own, never "wrong answer". Answers that are integers never start it.
"""

import re
from functools import cache

from rotrl.evaluate.verdict import Verdict

_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"([+-]?)([0-9]+)", re.ASCII)
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}((,|\{,\}|,\\!)[0-9]{3})+", re.ASCII)
_LONGEST = 2000  # characters; no answer of a data set has 300


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


def verify(given: str, answer: str) -> tuple[str, str]:
    """math-verify on the content of a box: a verdict's word and detail. It can hang and crash: only for `MathPool`."""
    from math_verify import verify as same

    try:
        expected = _reference(answer)
        if not expected:
            return "grader error", f"the reference answer {answer[:60]!r} can't be read"
        equal = same(expected, parse(given), timeout_seconds=None)
    except MemoryError:
        return "grader error", f"out of memory on {given[:60]!r}"
    if equal:
        return "accepted", ""
    return "wrong answer", f"expected {answer[:60]}, got {given[:60]}"


def parse(given: str) -> list:
    """What math-verify reads in a box."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as read

    # no plain-text extraction: it would take the last number of any text for the answer
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return read(rf"\boxed{{{given}}}", config, parsing_timeout=None)  # type: ignore[arg-type]


@cache
def _reference(answer: str) -> list:
    return parse(answer.strip().strip("$"))
