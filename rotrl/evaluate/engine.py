"""vLLM in processes of its own: requests go in, completions come back as they finish, weights are swapped in place.

engine = shared_engine(base, {"dtype": "float32"})       # returns at once, the process starts meanwhile
engine.load(expert)
for completion in engine.generate(requests, sampling): ...
"""

import atexit
import os
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.evaluate.engine_process import Died, EngineProcess, child_environment
from rotrl.evaluate.engine_settings import device_groups, must_agree
from rotrl.evaluate.folder import architecture, context_length, hidden_size, signature
from rotrl.evaluate.sampling import Completion, Request, Sampling
from rotrl.memory import free_gpu_memory

MAX_RESTARTS = 16
SHRINK = 8  # requests in flight after each death: a killer among 512 is alone after three more
NARROW = 512  # below it a matrix is too small to share: two threads wait for each other, and for the graders


class Engine:
    """`data_parallel_size` vLLM engines with the same weights, each in a spawned child, started in the background.

    `settings`: keywords of vLLM's LLM, and `threads` (of a CPU engine; null: all cores, for a narrow model one), `log`
    (a file for what vLLM prints). `max_model_len` is by default the context of the model. The engines take requests
    from one queue; on GPUs each has its own, as many as tensor and pipeline parallelism need.
    """

    def __init__(self, model_dir: Path, *, settings: Mapping[str, Any]) -> None:
        self.settings = must_agree(settings)
        self._devices = device_groups(settings)
        arguments = {key: value for key, value in settings.items() if value is not None}
        arguments.pop("data_parallel_size", None)
        self._threads = arguments.pop("threads", None) or self._share_of_cores(model_dir)
        self._log = Path(arguments.pop("log", None) or tempfile.mkstemp(prefix="rotrl-engine-", suffix=".log")[1])
        arguments["max_model_len"] = arguments.get("max_model_len") or context_length(model_dir)
        self._arguments = arguments
        self._tokenizer_dir = model_dir
        self._restart(model_dir)

    @property
    def max_model_len(self) -> int:
        return self._arguments["max_model_len"]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self._tokenizer_dir), local_files_only=True)

    def facts(self) -> dict[str, Any]:
        """vllm, device, dtype, max_model_len, max_num_seqs. Waits until every engine is ready."""
        try:
            for process in self._processes:
                process.ready()
        except EvaluationError:
            self.close()
            raise
        return self._processes[0].facts

    def fits(self, model_dir: Path) -> bool:
        """Whether these engines can take the weights of that model."""
        return Path(model_dir) == self.model or architecture(model_dir) == architecture(self.model)

    def load(self, model_dir: Path) -> None:
        """Put the weights of another model of the same architecture in place, and forget cached prefixes."""
        if not all(process.idle for process in self._processes) or not self.fits(model_dir):
            self._restart(model_dir)
        elif signature(model_dir) != self._loaded:
            self.facts()
            try:
                for process in self._processes:
                    process.send(("load", str(model_dir.resolve())))
                for process in self._processes:
                    process.receive()
                self.model, self._loaded = model_dir, signature(model_dir)
            except Died:
                self._restart(model_dir)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions in the order in which they finish.

        A bounded number is in flight. An engine that dies is started again and what was in flight there goes back into
        the queue, fewer at a time; a request that killed it at least twice, the last time alone, comes back as failed.
        """
        self.load(self.model)
        todo, deaths, restarts = deque(range(len(requests))), Counter[int](), 0
        while todo or any(process.live for process in self._processes):
            for process in self._fed(todo, requests, sampling, SHRINK ** max(deaths.values(), default=0)):
                try:
                    rows = process.receive()
                except Died:
                    restarts += 1
                    if restarts > MAX_RESTARTS:
                        self.close()
                        raise EvaluationError(f"vLLM died {restarts} times (last words in {process.log})") from None
                    suspects = sorted(process.live)
                    deaths.update(suspects)
                    if len(suspects) == 1 and deaths[suspects[0]] > 1:
                        yield Completion(requests[suspects[0]].key, "the engine died of it", (), "failed")
                        deaths.clear()
                    else:
                        todo.extendleft(reversed(suspects))
                    place = self._processes.index(process)
                    self._processes[place] = self._start(place)
                    continue
                for index, *_ in rows:
                    process.live.discard(index)
                    deaths.pop(index, None)
                yield from self._completions(rows, requests, sampling)

    def close(self) -> None:
        """End the children and everything that they started."""
        for process in self._processes:
            process.close()

    def _restart(self, model_dir: Path) -> None:
        for process in getattr(self, "_processes", ()):
            process.close()
        self.model, self._loaded = model_dir, signature(model_dir)
        self._processes = [self._start(place) for place in range(len(self._devices))]

    def _start(self, place: int) -> EngineProcess:
        order = {"model": str(self.model.resolve()), "arguments": self._arguments, "engines": len(self._devices)}
        log = self._log.with_suffix(f".{place}{self._log.suffix}") if place else self._log
        free_gpu_memory()
        return EngineProcess(self._command(), order, child_environment(self._threads, self._devices[place]), log)

    def _share_of_cores(self, model_dir: Path) -> int | None:
        if hidden_size(model_dir) < NARROW:
            return 1
        engines = len(self._devices)
        return max(1, len(os.sched_getaffinity(0)) // engines) if engines > 1 else None

    @staticmethod
    def _command() -> list[str]:
        return [sys.executable, "-P", "-m", "rotrl.evaluate.engine_child"]

    def _fed(
        self, todo: deque[int], requests: Sequence[Request], sampling: Sampling, shrunk: int
    ) -> list[EngineProcess]:
        """Those with something to say, once each that is ready has enough to do."""
        for process in self._processes:
            window = max(1, 2 * process.facts["max_num_seqs"] // shrunk) if process.facts else 0
            chosen = [todo.popleft() for _ in range(min(len(todo), window - len(process.live)))]
            if chosen:
                process.live.update(chosen)
                rows = [(index, list(requests[index].prompt_ids), requests[index].seed) for index in chosen]
                process.send(("add", sampling.parameters(), rows))
        talking = wait([process.connection for process in self._processes])
        return [process for process in self._processes if process.connection in talking]

    def _completions(self, rows: list[tuple], requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        texts = [text for _, _, text, _ in rows]
        if not sampling.stop:
            decoded = self._tokenizer.batch_decode([ids for _, ids, _, _ in rows], skip_special_tokens=True)
            texts = [text if reason == "failed" else new for (*_, text, reason), new in zip(rows, decoded, strict=True)]
        for (index, ids, _, reason), text in zip(rows, texts, strict=True):
            yield Completion(requests[index].key, text, ids, reason)


_shared: Engine | None = None


def shared_engine(model_dir: Path, settings: Mapping[str, Any]) -> Engine:
    """The one engine of this process, kept for the next stage or job where the settings allow it.

    Returns at once; the child starts, or keeps its weights, until something is asked of it. An engine of the same
    settings with at least this `max_model_len` is used again.
    """
    global _shared
    length = settings.get("max_model_len") or context_length(model_dir)
    if _shared is not None:
        if _shared.settings == must_agree(settings) and _shared.max_model_len >= length and _shared.fits(model_dir):
            return _shared
        _shared.close()
    _shared = Engine(model_dir, settings={**settings, "max_model_len": length})
    return _shared


@atexit.register
def close_shared_engine() -> None:
    global _shared
    if _shared is not None:
        _shared.close()
        _shared = None
