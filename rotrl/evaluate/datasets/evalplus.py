"""HumanEval+ and MBPP+ (EvalPlus, arXiv 2305.01210): functions with many tests, compared outside of the program.

    _target_: rotrl.evaluate.datasets.evalplus.humaneval
    path, revision, prompt, problems, limit   as for the mathematics sets; a prompt has {problem} and {format} in it

The field `test` is a program that calls the candidate and asserts in the candidate's own process, where `os._exit(0)`
passes. It is never run: its lists `inputs` and `results` are read off its syntax tree, the inputs go into the sandbox,
and the results are compared here by EvalPlus' rules (`compare.same_python`). Where the results are not written out (the
largest outputs, and values that are no literals) the data set's reference program gives them, in the sandbox too.
"""

import ast
import contextlib
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.evaluate.datasets.source import Benchmark, Source, fill, locate, read
from rotrl.evaluate.sandbox.inside.values import HASHED, encode
from rotrl.evaluate.task import Problem, Test
from rotrl.values import Count

PROMPT = "Write this Python function.\n\n{problem}\n\n{format}"
FORMAT = (
    "Give the whole function, with its imports and all that it needs, in one block:\n```python\n# your function\n```"
)


def humaneval(
    *,
    path: str | Path | None = None,
    revision: str | None = "d32357cf319e50e9c8d8dab5ea876c72b0fd321b",
    prompt: str | None = None,
    problems: Count | None = 164,
    limit: Count | None = None,
) -> Benchmark:
    """HumanEval+ (evalplus/humanevalplus): a signature with its description. `find_zero` takes any root."""
    fields = ("task_id", "prompt", "canonical_solution", "entry_point", "test")
    source = Source("humaneval", "evalplus/humanevalplus", fields)
    origin, files = locate(source, path, revision, {"data/test-00000-of-00001-5973903632b82d40.parquet": problems})
    found = []
    for place, row in islice(read(source, files), limit):
        place, asked = f"{place} ({row['task_id']})", f"```python\n{row['prompt'].strip()}\n```"
        reference = row["prompt"] + row["canonical_solution"]
        _, tolerance, tests, complete = _tests(row["test"], place)
        found.append(
            Problem(
                str(row["task_id"]),
                fill(prompt or PROMPT, source.key, problem=asked, format=FORMAT),
                tests=tests,
                entry_point=_name(row["entry_point"], place),
                tolerance=tolerance,
                reference=None if complete or row["entry_point"] == "find_zero" else reference,
            )
        )
    return Benchmark(source.name, tuple(found), "code", origin)


def mbpp(
    *,
    path: str | Path | None = None,
    revision: str | None = "9a36f31e81d5e1670b68e6de8ef23da0c4e1abb5",
    prompt: str | None = None,
    problems: Count | None = 378,
    limit: Count | None = None,
) -> Benchmark:
    """MBPP+ v0.2.0 (evalplus/mbppplus): a sentence, the signature of the reference and the first public test."""
    fields = ("task_id", "code", "prompt", "test_list", "test")
    source = Source("mbpp", "evalplus/mbppplus", fields)
    origin, files = locate(source, path, revision, {"data/test-00000-of-00001-d5781c9c51e02795.parquet": problems})
    found = []
    for place, row in islice(read(source, files), limit):
        place = f"{place} ({row['task_id']})"
        called, tolerance, tests, complete = _tests(row["test"], place)
        name = _name(called, place)
        example = f"\n\nFor example:\n```python\n{row['test_list'][0]}\n```" if len(row["test_list"]) else ""
        asked = f"{row['prompt'].strip()}\n```python\n{_signature(row['code'], name, place)}\n```{example}"
        found.append(
            Problem(
                str(row["task_id"]),
                fill(prompt or PROMPT, source.key, problem=asked, format=FORMAT),
                tests=tests,
                entry_point=name,
                tolerance=tolerance,
                reference=None if complete else row["code"],
            )
        )
    return Benchmark(source.name, tuple(found), "code", origin)


def _tests(source: Any, place: str) -> tuple[str | None, float, tuple[Test, ...], bool]:
    """What is called, the tolerance, the tests, and whether they have outputs, of a `test` program."""
    place = f"{place}, field test"
    with _long_integers():
        try:
            tree = ast.parse(source)
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
            raise EvaluationError(f"{place}: no Python program ({error})") from None
        lists: dict[str, ast.expr] = {}
        called, tolerance = None, None
        for node in _statements(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                lists.setdefault(node.targets[0].id, node.value)
            if isinstance(node, ast.For):
                called, tolerance = _asserted(node.body[-1])
        try:
            inputs = value(lists["inputs"])
            tolerance = float(tolerance)  # pyright: ignore[reportArgumentType]
        except (KeyError, ValueError, TypeError) as error:
            raise EvaluationError(f"{place}: no loop over literal inputs that asserts ({error!r})") from None
        try:
            results = value(lists["results"])
        except (KeyError, ValueError):
            results = None
        if not inputs or (results is not None and len(results) != len(inputs)):
            raise EvaluationError(f"{place}: {len(inputs)} inputs and {len(results or ())} results")
        pairs = zip(inputs, results or [None] * len(inputs), strict=True)
        tests = tuple(Test(encode(list(given)), encode(wanted)) for given, wanted in pairs)
    return called, tolerance, tests, results is not None


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        yield from node.body if isinstance(node, ast.FunctionDef) and node.name == "check" else [node]


def _asserted(node: ast.stmt) -> tuple[str | None, Any]:
    """Of `assertion(NAME(*inp), exp, TOLERANCE)` or `assert ... <= TOLERANCE`."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and len(node.value.args) == 3:
        call, _, tolerance = node.value.args
        name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
        return name, value(tolerance)
    if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare):
        return None, value(node.test.comparators[-1])
    return None, None


def value(node: ast.expr) -> Any:
    """The value of a literal as `repr` writes it: also inf, set(), Counter({...}). ValueError for anything else."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List():
            return [value(item) for item in node.elts]
        case ast.Tuple():
            return tuple(value(item) for item in node.elts)
        case ast.Set():
            return {value(item) for item in _few(node.elts)}
        case ast.Dict():
            keys = [value(key) for key in _few(node.keys) if key is not None]
            return dict(zip(keys, map(value, node.values), strict=True))
        case ast.UnaryOp(op=ast.USub()):
            return -value(node.operand)
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            sign = 1 if isinstance(node.op, ast.Add) else -1
            return value(node.left) + sign * value(node.right)
        case ast.Name(id="inf" | "nan"):
            return float(node.id)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _MAKERS:
            return _MAKERS[name](*map(value, node.args))
    raise ValueError(f"{ast.unparse(node)[:60]} is no literal")


_MAKERS: dict[str, Any] = {
    "set": set,
    "frozenset": frozenset,
    "Counter": Counter,
    "OrderedDict": OrderedDict,
    "float": float,
    "complex": complex,
}


def _few(nodes: list) -> list:
    if len(nodes) > HASHED:
        raise ValueError(f"more than {HASHED} keys")
    return nodes


@contextlib.contextmanager
def _long_integers() -> Iterator[None]:
    """Python refuses to read integers of more than 4300 digits; some results have more."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def _name(name: Any, place: str) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise EvaluationError(f"{place}: the tests call {name!r}, expected the name of a function")
    return name


def _signature(code: str, name: str, place: str) -> str:
    try:
        for node in ast.parse(code).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return f"def {name}({ast.unparse(node.args)}):"
    except SyntaxError as error:
        raise EvaluationError(f"{place}, field code: no Python program ({error})") from None
    raise EvaluationError(f"{place}, field code: it does not define {name}")
