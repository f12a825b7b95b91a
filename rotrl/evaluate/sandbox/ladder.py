"""The ladder of sandbox levels: the strongest that this machine proves is used, and none below the minimum."""

import os
import shutil
from typing import Literal

from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate.sandbox.canary import breaches
from rotrl.evaluate.sandbox.pool import Sandbox
from rotrl.evaluate.sandbox.server import LEVELS, SandboxFault
from rotrl.values import Count

_REMEDY = {
    "bubblewrap": "install bubblewrap and allow user namespaces",
    "landlock": "use Linux 5.13 or later with Landlock enabled, in a container that lets its system calls pass",
}


def open_sandbox(
    minimum: Literal["none", "landlock", "bubblewrap"] = "landlock",
    allow_unsandboxed: bool = False,
    workers: Count | None = None,
) -> Sandbox:
    """The strongest level from "bubblewrap" down to `minimum` whose canaries are all stopped here.

    "none", which only limits resources, is never a silent fallback: it needs allow_unsandboxed=True. Raises
    EvaluationError that says what each level lacks. `workers` is one a core by default, 32 at most.
    """
    if minimum not in LEVELS:
        raise ConfigError(f"sandbox.minimum: {minimum!r} is no level; choose one of {', '.join(LEVELS)}")
    workers = workers or min(len(os.sched_getaffinity(0)), 32)
    missing = []
    for level in reversed(LEVELS[1:]):
        if LEVELS.index(level) < LEVELS.index(minimum):
            continue
        try:
            return _proven(level, workers)
        except SandboxFault as fault:
            missing.append(f"{level}: {fault}; {_REMEDY[level]}")
    if not allow_unsandboxed:
        raise EvaluationError(
            f"no sandbox of level {minimum} or above for model-written code ({'. '.join(missing)}); "
            "or generate here and grade elsewhere; sandbox.allow_unsandboxed=true runs it with your rights"
        )
    return Sandbox("none", workers)


def ladder() -> dict[str, str]:
    """Each level above "none", strongest first, with "" where it holds here and else the reason why not."""
    reasons = {}
    for level in reversed(LEVELS[1:]):
        try:
            _proven(level, 1).close()
            reasons[level] = ""
        except SandboxFault as fault:
            reasons[level] = str(fault)
    return reasons


def probe() -> str:
    """The strongest level that holds on this machine, "none" where no other does."""
    return next((level for level, reason in ladder().items() if not reason), "none")


def _proven(level: str, workers: int) -> Sandbox:
    if level == "bubblewrap" and shutil.which("bwrap") is None:
        raise SandboxFault("the program bwrap is not installed")
    sandbox = Sandbox(level, workers)
    try:
        reason = breaches(sandbox)
    except BaseException:
        sandbox.close()
        raise
    if reason:
        sandbox.close()
        raise SandboxFault(reason)
    return sandbox
