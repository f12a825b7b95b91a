"""Rewards for training on the tiny tasks: exact, in process, and safe because the grammar is a whitelist.

The evaluation grades with its own graders and sandbox; a test holds the two against each other.
"""

import ast
import re

from rotrl.evaluate.task import Problem

ALLOWED = (
    *(ast.Expression, ast.Lambda, ast.arguments, ast.arg, ast.Name, ast.Load, ast.Constant, ast.Call),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Pow, ast.UnaryOp, ast.USub, ast.UAdd),
)
NAMES = {"abs": abs, "max": max, "min": min}


def reward(problem: Problem, completion: str) -> float:
    """1 for a right answer, else 0."""
    if problem.entry_point is None:
        boxes = re.findall(r"\\boxed\{(\d+)\}", completion)
        return float(bool(boxes) and int(boxes[-1]) == int(problem.answer or "-1"))
    return float(passes(problem, completion))


def passes(problem: Problem, completion: str) -> bool:
    try:
        tree = ast.parse(completion, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    if not all(map(allowed, ast.walk(tree))):
        return False
    try:
        function = eval(compile(tree, "<completion>", "eval"), {"__builtins__": {}, **NAMES})
        return all(function(*test.input) == test.output for test in problem.tests)
    except Exception:  # any failure of a sampled program is a wrong answer
        return False


def allowed(node: ast.AST) -> bool:
    """Calls only by name; only squares as a power, for a tower such as 9**9**9 would never end."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return isinstance(node.right, ast.Constant) and node.right.value == 2
    return isinstance(node, ALLOWED)
