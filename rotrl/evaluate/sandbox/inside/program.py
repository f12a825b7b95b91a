"""Runs one program in a child that is already locked down. Whatever goes wrong from here on is the program's fault.

The answers go to a report file, one line a test: `<nonce> <JSON>`. Expected outputs are not in this process, so a
program that forges a line only gives an answer.
"""

import atexit
import builtins
import json
import os
import random
import sys
import textwrap
import threading
import types

from values import decode, encode

# What LiveCodeBench imports before a program: models write for it. Modules win over what they export.
_STARRED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io json"
)
NAMES: dict[str, object] = {}
for _module in (*_STARRED.split(), "typing"):
    exec(f"from {_module} import *", NAMES)
NAMES |= {name: sys.modules[name] for name in (*_STARRED.split(), "sys")}


class NotCompiled(Exception):
    """The text is no Python program."""


def run(data: bytes, report: int):
    """Run {program, entry_point, inputs, nonces} and end the process: 0 where the program came to its end."""
    request = json.loads(data)
    builtins.exit = builtins.quit = sys.exit  # `site` would add them
    sys.setrecursionlimit(50_000)
    random.seed(0)  # the same program gives the same output again; a fork would reseed
    sys.argv = ["program"]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115

    streams = {name: value for name, value in vars(sys).items() if not name.startswith("_")}
    builtins.__dict__.update({**streams, **NAMES, **builtins.__dict__})

    def tell(nonce: str, **answer) -> None:
        line = f"{nonce} {json.dumps(answer)}\n".encode()
        while line:
            line = line[os.write(report, line) :]

    run_tests = _standard_input if request["entry_point"] is None else _functional
    code = 1
    try:
        code = run_tests(request, tell)
    finally:  # no exception leads back into the server
        os._exit(code)


def _functional(request: dict, tell) -> int:
    nonces = request["nonces"]
    try:
        function = _load(request["program"], request["entry_point"])
    except BaseException as error:
        tell(nonces[0], **_fault(error))
        return 1
    for nonce, arguments in zip(nonces, request["inputs"], strict=True):
        arguments = decode(arguments) if request["python"] else arguments
        try:
            answer = {"status": "ok", "value": encode(function(*arguments))}
        except BaseException as error:
            answer = _fault(error)
        tell(nonce, **answer)
        if answer["status"] != "ok":
            return 1
    return 0


def _load(source: str, entry_point: str):
    """The function of that name, a method of class Solution, or the value of a program that is one expression."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        expression = compile(source.strip(), "<program>", "eval", dont_inherit=True)
    except Exception:
        exec(_compile(source), module.__dict__)
    else:
        setattr(module, entry_point, eval(expression, module.__dict__))
    if not hasattr(module, entry_point) and hasattr(module, "Solution"):
        return getattr(module.Solution(), entry_point)
    return getattr(module, entry_point)


def _standard_input(request: dict, tell) -> int:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    code = 0
    try:
        try:
            exec(_compile(request["program"]), module.__dict__)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        tell(request["nonces"][0], **_fault(error))
        return 1
    return code & 0xFF


def _compile(source: str):
    try:
        return compile(textwrap.dedent(source), "<program>", "exec", dont_inherit=True)
    except Exception as error:
        raise NotCompiled(f"{type(error).__name__}: {error}") from None


def _fault(error: BaseException) -> dict[str, str]:
    words = {MemoryError: "memory limit", NotCompiled: "compile error"}
    status = words.get(type(error), "runtime error")
    try:
        detail = str(error) if type(error) is NotCompiled else f"{type(error).__name__}: {error}"
    except BaseException:
        detail = type(error).__name__
    return {"status": status, "detail": detail[:200]}
