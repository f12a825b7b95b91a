"""vLLM in a process of its own: requests go in, completions come back as they finish, weights are swapped in place.

engine = shared_engine(base, {"dtype": "float32"})       # returns at once, the process starts meanwhile
engine.load(expert)
for completion in engine.generate(requests, sampling): ...
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NoReturn

from rotrl.errors import EvaluationError
from rotrl.evaluate.folder import context_length, hidden_size, same_architecture, signature
from rotrl.evaluate.sampling import Completion, Request, Sampling

MAX_RESTARTS = 16
SHRINK = 8  # requests in flight after each death: a killer among 512 is alone after three more
NARROW = 512  # below it a matrix is too small to share: two threads wait for each other, and for the graders
ENVIRONMENT = ("PATH", "HOME", "USER", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")
PREFIXES = ("LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "VLLM_", "TORCH", "TRITON_", "OMP_", "MKL_", "KMP_")
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


class Engine:
    """One vLLM engine in a spawned child, started in the background.

    `settings`: keywords of vLLM's LLM, and `threads` (of a CPU engine; null: all cores, for a narrow model one), `log`
    (a file for what vLLM prints). `max_model_len` is by default the context of the model.
    """

    def __init__(self, model_dir: Path, *, settings: Mapping[str, Any]) -> None:
        self.settings = _chosen(settings)
        self._arguments = {key: value for key, value in settings.items() if value is not None}
        self._threads = self._arguments.pop("threads", 1 if hidden_size(model_dir) < NARROW else None)
        log = self._arguments.pop("log", None)
        self.log = Path(log or tempfile.mkstemp(prefix="rotrl-engine-", suffix=".log")[1])
        self._arguments["max_model_len"] = self._arguments.get("max_model_len") or context_length(model_dir)
        self._tokenizer_dir = model_dir
        self._live: set[int] = set()
        self._start(model_dir)

    @property
    def max_model_len(self) -> int:
        return self._arguments["max_model_len"]

    @property
    def pid(self) -> int:
        return self._process.pid

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self._tokenizer_dir), local_files_only=True)

    def facts(self) -> dict[str, Any]:
        """vllm, device, dtype, max_model_len, max_num_seqs. Waits until the engine is ready."""
        if self._facts is None:
            try:
                kind, *content = self._receive()
            except _Died:
                raise EvaluationError(f"vLLM died while it started (last words in {self.log})") from None
            if kind == "failed":
                self.close()
                raise EvaluationError(f"vLLM did not start: {content[0][:500]} (all of it in {self.log})")
            self._facts = content[0]
        return self._facts

    def load(self, model_dir: Path) -> None:
        """Put the weights of another model of the same architecture in place, and forget cached prefixes."""
        if not self._idle() or not same_architecture(model_dir, self.model):
            self.close()
            self._start(model_dir)
        elif signature(model_dir) != self._loaded:
            self.facts()
            try:
                self._send(("load", str(model_dir.resolve())))
                self._receive()
                self.model, self._loaded = model_dir, signature(model_dir)
            except _Died:
                self._start(model_dir)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions in the order in which they finish.

        A bounded number is in flight. When the engine dies it is started again with what was in flight, fewer at a
        time; a request that killed it at least twice, the last time alone, comes back as failed.
        """
        self.load(self.model)
        todo, deaths, restarts = deque(range(len(requests))), Counter[int](), 0
        while todo or self._live:
            try:
                window = 2 * self.facts()["max_num_seqs"]
                self._fill(todo, requests, sampling, max(1, window // SHRINK ** max(deaths.values(), default=0)))
                _, rows = self._receive()
            except _Died:
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise EvaluationError(f"vLLM died {restarts} times (last words in {self.log})") from None
                deaths.update(self._live)
                suspects, self._live = sorted(self._live), set()
                if len(suspects) == 1 and deaths[suspects[0]] > 1:
                    yield Completion(requests[suspects[0]].key, "the engine died of it", (), "failed")
                    deaths.clear()
                else:
                    todo.extendleft(reversed(suspects))
                self._start(self.model)
                continue
            self._live.difference_update(row[0] for row in rows)
            for index, *_ in rows:
                deaths.pop(index, None)
            yield from self._completions(rows, requests, sampling)

    def close(self) -> None:
        """End the child and everything that it started."""
        self._connection.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._live = set()

    def _idle(self) -> bool:
        """Alive, and without requests that an earlier caller did not wait for."""
        return not self._live and not self._connection.closed and self._process.poll() is None

    def _start(self, model_dir: Path) -> None:
        self._connection, theirs = Pipe()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command(), str(theirs.fileno())],
                env=child_environment(self._threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        theirs.close()
        self.model, self._loaded, self._facts = model_dir, signature(model_dir), None
        self._connection.send({"model": str(model_dir.resolve()), "arguments": self._arguments})

    @staticmethod
    def _command() -> list[str]:
        return [sys.executable, "-P", "-m", "rotrl.evaluate.engine_child"]

    def _fill(self, todo: deque[int], requests: Sequence[Request], sampling: Sampling, window: int) -> None:
        chosen = [todo.popleft() for _ in range(min(len(todo), window - len(self._live)))]
        if chosen:
            self._live.update(chosen)
            rows = [(index, list(requests[index].prompt_ids), requests[index].seed) for index in chosen]
            self._send(("add", sampling.parameters(), rows))

    def _completions(self, rows: list[tuple], requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        texts = [text for _, _, text, _ in rows]
        if not sampling.stop:
            decoded = self._tokenizer.batch_decode([ids for _, ids, _, _ in rows], skip_special_tokens=True)
            texts = [text if reason == "failed" else new for (*_, text, reason), new in zip(rows, decoded, strict=True)]
        for (index, ids, _, reason), text in zip(rows, texts, strict=True):
            yield Completion(requests[index].key, text, ids, reason)

    def _send(self, message: tuple) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._bury()

    def _receive(self) -> tuple:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._bury()

    def _bury(self) -> NoReturn:
        live = self._live
        self.close()
        self._live = live
        raise _Died from None


class _Died(Exception):
    """The child is gone."""


_shared: Engine | None = None


def shared_engine(model_dir: Path, settings: Mapping[str, Any]) -> Engine:
    """The one engine of this process, kept for the next stage or job where the settings allow it.

    Returns at once; the child starts, or keeps its weights, until something is asked of it. An engine of the same
    settings with at least this `max_model_len` is used again.
    """
    global _shared
    wanted, length = _chosen(settings), settings.get("max_model_len") or context_length(model_dir)
    if _shared is not None:
        if (_shared.settings, same_architecture(model_dir, _shared.model)) == (wanted, True) and (
            _shared.max_model_len >= length
        ):
            return _shared
        _shared.close()
    _shared = Engine(model_dir, settings={**settings, "max_model_len": length})
    return _shared


def _chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree for an engine to serve again."""
    return {key: value for key, value in settings.items() if key not in ("log", "max_model_len") and value is not None}


@atexit.register
def close_shared_engine() -> None:
    global _shared
    if _shared is not None:
        _shared.close()
        _shared = None


def child_environment(threads: int | None = None) -> dict[str, str]:
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
    return kept
