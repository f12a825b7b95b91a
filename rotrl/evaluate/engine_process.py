"""The process of one vLLM engine from the outside: started, spoken to, ended, and asked why it would not start."""

import contextlib
import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NoReturn

from rotrl.errors import EvaluationError

ENVIRONMENT = ("PATH", "HOME", "USER", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")
PREFIXES = ("LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "VLLM_", "TORCH", "TRITON_", "OMP_", "MKL_", "KMP_")
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_ERROR = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception)): (\S.*)$", re.MULTILINE)
_POINTERS = ("Engine core initialization failed", "See root cause", "WorkerProc initialization failed")


class Died(Exception):
    """The process is gone."""


class EngineProcess:
    """One child and what it was given: `live` are the indices of the requests that it has not answered."""

    def __init__(self, command: Sequence[str], order: Mapping[str, Any], environment: Mapping[str, str], log: Path):
        self.connection, theirs = Pipe()
        self.log, self.live, self.facts = log, set[int](), dict[str, Any]()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        theirs.close()
        self.connection.send(order)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def idle(self) -> bool:
        """Alive, and without requests that an earlier caller did not wait for."""
        return not self.live and not self.connection.closed and self._process.poll() is None

    def ready(self) -> dict[str, Any]:
        """What the engine says of itself. Waits for it; EvaluationError with the cause where it does not start."""
        while not self.facts:
            self.receive()
        return self.facts

    def send(self, message: tuple) -> None:
        """To a dead process too: its death is told by `receive`."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self) -> list[tuple]:
        """The completions of the next message, none where it is of another kind."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            self._bury()
        if kind == "ready":
            self.facts = content[0]
        elif kind == "failed":
            self._refuse(content[0])
        return content[0] if kind == "done" else []

    def close(self) -> None:
        """End the child and everything that it started."""
        if not self.connection.closed:
            self.connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _bury(self) -> NoReturn:
        if not self.facts:
            self._refuse(None)
        self.close()
        raise Died from None

    def _refuse(self, said: str | None) -> NoReturn:
        """With what it said, or the cause in its log where it said nothing or only points there."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        ended = self._process.returncode
        self.close()
        if said is None or any(words in said for words in _POINTERS):
            with self.log.open("rb") as file:
                file.seek(self._log_start)
                said = cause_of(file.read().decode(errors="replace")) or said or f"its process ended with code {ended}"
        if ended == -signal.SIGKILL:
            said = "its process was killed, as the kernel does when memory runs out; lower engine.max_num_seqs"
        raise EvaluationError(f"vLLM did not start: {textwrap.shorten(said, 300)} (all of it in {self.log})")


def cause_of(log: str) -> str | None:
    """The last error in what vLLM printed that does not only point to another."""
    found = [f"{name}: {text.strip()}" for name, text in _ERROR.findall(log)]
    return next((line for line in reversed(found) if not any(words in line for words in _POINTERS)), None)


def child_environment(threads: int | None = None, devices: str | None = None) -> dict[str, str]:
    """The allow-listed part of this process's environment, without secrets; the hub and usage reports are off."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in ENVIRONMENT or name.startswith(PREFIXES)) and not any(word in name for word in SECRETS)
    }
    package = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (package, kept.get("PYTHONPATH"))))
    kept |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"), "1")
    kept["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    if threads is not None:
        kept |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = devices
    return kept
