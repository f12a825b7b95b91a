"""Pairs and programs graded a second: python benchmarks/grading.py [pairs of each kind] [programs]

Pairs are distinct answers as AIME and MATH have them, through `MathPool` beside math-verify as it is. Programs go
through the sandbox at its default level, beside a fresh interpreter for each and beside a Manager and a Process for
each, as LiveCodeBench runs them (neither isolates anything). Two workers; CPU seconds are those of all processes.
"""

import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rotrl.evaluate.math import grade_plain, verify
from rotrl.evaluate.math_pool import MathPool
from rotrl.evaluate.sandbox import open_sandbox
from rotrl.evaluate.task import Test

KINDS: dict[str, Callable[..., tuple[str, str]]] = {
    "integer": lambda a, b, c, d: (f"{a}{b}", f"0{a}{b}"),
    "fraction": lambda a, b, c, d: (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a}}}{{{c}}}"),
    "decimal": lambda a, b, c, d: (f"{a}.{b}", rf"\frac{{{a * 100 + b}}}{{100}}"),
    "surd": lambda a, b, c, d: (rf"{a}+{b}\sqrt{{{c}}}", rf"{b}\sqrt{{{c}}}+{a}"),
    "surd over": lambda a, b, c, d: (rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}", rf"\frac{{{d}\sqrt{{{b}}}}}{{{c}}}"),
    "tuple": lambda a, b, c, d: (f"({a},{b},{c})", f"({a}, {b}, {d})"),
    "interval": lambda a, b, c, d: (rf"[{a},{a + b})", rf"\left[{a},{a + b}\right)"),
    "union": lambda a, b, c, d: (rf"(-\infty, {a}) \cup ({a + b},\infty)", rf"(-\infty,{a})\cup({a + b},\infty)"),
    "list": lambda a, b, c, d: (f"{a}, {b}, {c}", f"{c},{b},{a}"),
    "polynomial": lambda a, b, c, d: (f"x^2+{a}x+{b}", f"{b}+{a}x+x^2"),
    "text": lambda a, b, c, d: (rf"\text{{name{a}}}", rf"\text{{name{b}}}"),
    "unit": lambda a, b, c, d: (rf"{a}.5\text{{ cm}}", f"{b}"),
    "degrees": lambda a, b, c, d: (rf"{a}.5^\circ", f"{a}.5"),
}
PROGRAM = "n = int(input())\nprint(sum(i * i % 7 for i in range(n)))\n"
INPUT = "100\n"


def measured(name: str, count: int, work: Callable[[], object], baseline: float | None = None) -> float:
    start = time.monotonic()
    work()
    wall = time.monotonic() - start
    ratio = "" if baseline is None else f"   {count / wall / baseline:6.1f} times the baseline"
    print(f"{name:34} {count / wall:8.0f} a second{ratio}", flush=True)
    return count / wall


def pairs(count: int) -> None:
    rng = random.Random(0)
    found = [make(*(rng.randint(2, 99) for _ in range(4))) for make in KINDS.values() for _ in range(count)]
    rng.shuffle(found)
    print(f"{len(found)} pairs of {len(KINDS)} kinds")
    baseline = measured("math-verify, one process", len(found), lambda: [verify(*pair) for pair in found])
    with MathPool(workers=2) as pool, ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda n: pool.grade(f"{n}/7", f"{n}.0/7"), (1, 3)))  # the start of both is not theirs

        def grade(pair: tuple[str, str]) -> object:
            return grade_plain(rf"\boxed{{{pair[0]}}}", pair[1]) or pool.grade(*pair)

        measured("MathPool, 2 workers", len(found), lambda: list(threads.map(grade, found)), baseline)


def fresh(_: int) -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", PROGRAM], input=INPUT, capture_output=True, text=True, check=True)


def _into(answers, program: str) -> None:
    exec(program, {"input": lambda: INPUT, "print": answers.append})


def manager_and_process(_: int) -> None:
    with multiprocessing.Manager() as manager:
        answers = manager.list()
        process = multiprocessing.Process(target=_into, args=(answers, PROGRAM))
        process.start()
        process.join()


def programs(count: int) -> None:
    with ThreadPoolExecutor(2) as threads:
        few = max(20, count // 10)
        baseline = measured(
            "Manager and Process for each", few, lambda: list(threads.map(manager_and_process, range(few)))
        )
        measured("fresh interpreter for each", few, lambda: list(threads.map(fresh, range(few))), baseline)
        with open_sandbox(workers=2) as sandbox:
            tests = [Test(INPUT, "")]

            def run(_: int) -> None:
                assert sandbox.run(PROGRAM, tests, None)[0].status == "ok"

            measured(f"sandbox, {sandbox.level}", count, lambda: list(threads.map(run, range(count))), baseline)


if __name__ == "__main__":
    sizes = [int(argument) for argument in sys.argv[1:]] or [40, 600]
    pairs(sizes[0])
    programs(sizes[-1])
