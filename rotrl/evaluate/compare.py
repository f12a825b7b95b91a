"""When an answer of a program is the expected one: texts of standard output, JSON values, Python values of EvalPlus."""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

# no leading zeros: "0101" and "101" are different texts, not one number
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]{0,300})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_TOLERANCE = 1e-6


def same_value(expected: Any, value: Any) -> bool:
    """Equality of JSON values: numbers by value (15.0 is 15), a truth value is no number, order counts in lists.

    Tuples count as lists. Where the expected number is a float, 1e-6 relative or absolute is allowed; an expected
    integer is met exactly.
    """
    if isinstance(expected, bool) or isinstance(value, bool) or expected is None or value is None:
        return type(expected) is type(value) and expected == value
    if isinstance(expected, int | float) and isinstance(value, int | float):
        return expected == value or (isinstance(expected, float) and _close(expected, value))
    if isinstance(expected, list | tuple) and isinstance(value, list | tuple):
        return len(expected) == len(value) and all(map(same_value, expected, value))
    if isinstance(expected, dict) and isinstance(value, dict):
        return expected.keys() == value.keys() and all(same_value(expected[key], value[key]) for key in expected)
    return isinstance(expected, str) and isinstance(value, str) and expected == value


def same_text(expected: str, value: str) -> bool:
    """Equality of output line by line and token by token; white space around lines and text is ignored.

    Tokens that differ as text are equal as numbers by the rule of `same_value`.
    """
    lines, other = ([line.split() for line in text.strip().split("\n")] for text in (expected, value))
    return len(lines) == len(other) and all(
        len(line) == len(given) and all(map(_same_token, line, given)) for line, given in zip(lines, other, strict=True)
    )


def _same_token(expected: str, value: str) -> bool:
    if expected == value:
        return True
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(value)):
        return False
    number, given = Decimal(expected), Decimal(value)
    return number == given or ("." in expected and _close(float(number), float(given)))


def _close(expected: float, value: float) -> bool:
    try:
        return math.isclose(expected, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    except OverflowError:  # an integer beyond every float
        return False


# EvalPlus (arXiv 2305.01210), v0.3.1: problems whose answer is not one value, by the function's name

UNORDERED = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}
SOMETHING = {"check_str", "text_match_three", "text_starta_endb"}  # a match or None stands for the truth value


def same_python(name: str, arguments: Sequence[Any], expected: Any, value: Any, tolerance: float) -> bool:
    """EvalPlus' rule for the function `name`: Python's equality, else within rtol 1e-7 and atol `tolerance`.

    The tolerance is 1e-6 where it is 0 and the expected value is a float or a list of floats. A result within the
    tolerance has the expected type. `find_zero` is any root; `are_equivalent` has no defined answer.
    """
    try:
        if name == "find_zero":
            coefficients = arguments[0]
            return abs(sum(c * math.pow(value, i) for i, c in enumerate(coefficients))) <= tolerance
        if name == "are_equivalent":
            return True
        if name in UNORDERED:
            return set(value) == set(expected)
        if name in SOMETHING and not isinstance(value, bool):
            return expected == (value is not None)
        if value == expected or (name in _ACCEPTED and value in _ACCEPTED[name](*arguments)):
            return True
        floats = expected if isinstance(expected, list | tuple) and expected else [expected]
        if tolerance == 0 and all(isinstance(item, float) for item in floats):
            tolerance = _TOLERANCE
        return tolerance > 0 and type(value) is type(expected) and _allclose(expected, value, tolerance)
    except (TypeError, ValueError, OverflowError, RecursionError, ArithmeticError, AttributeError):
        return False


def _allclose(expected: Any, value: Any, tolerance: float) -> bool:
    """numpy.allclose(value, expected, rtol=1e-7, atol=tolerance) of numbers and nested sequences."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(expected) == len(value)
            and all(_allclose(e, v, tolerance) for e, v in zip(expected, value, strict=True))
        )
    if value == expected:
        return True
    return bool(abs(value - expected) <= tolerance + 1e-7 * abs(expected)) and not math.isinf(abs(expected))


def _pyramid(edge: float, height: float) -> list[int]:
    """surface_Area whose `height` is that of the pyramid, not of its sides."""
    return [round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))]


def _digits(one: int, other: int) -> list[int]:
    """digit_distance_nums of numbers padded to one length."""
    width = max(len(str(one)), len(str(other)))
    pairs = zip(str(one).zfill(width), str(other).zfill(width), strict=True)
    return [sum(abs(int(a) - int(b)) for a, b in pairs)]


_ACCEPTED: Mapping[str, Any] = {
    "sum_div": lambda *_: [0],
    "surface_Area": _pyramid,
    "digit_distance_nums": _digits,
}
ORACLES = {"find_zero", *_ACCEPTED}  # those that look at the arguments
