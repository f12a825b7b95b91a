"""A merge made tensor by tensor and written as it is made: while one is merged, others are read, copied and written."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rotrl.checkpoint.header import word_of
from rotrl.checkpoint.rounding import cast
from rotrl.checkpoint.writer import Entries, write_weights
from rotrl.errors import ConfigError, NumericsError
from rotrl.merge.chunks import keep_freed_memory
from rotrl.merge.measure import Measure
from rotrl.merge.merger import Merger


def devices(device: str) -> list[str]:
    """Where matrices are merged in turn, by the configuration's `device`: auto is all GPUs, or the processor.

    A GPU stands there twice: while it merges one tensor the next is read and copied to it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [f"cuda:{i}" for i in range(count)]
    chosen = {"auto": found or ["cpu"], "cpu": ["cpu"], "cuda": found} | {name: [name] for name in found}
    if not chosen.get(device):
        raise ConfigError(f"device is {device!r}, one of {', '.join(['auto', 'cpu', *found])} is expected")
    return chosen[device] * (1 if chosen[device] == ["cpu"] else 2)


@dataclass(frozen=True)
class Stream:
    """Writes the tensors of a merger into a folder."""

    folder: Path
    merger: Merger
    rounding: str
    devices: Sequence[str]
    key: str
    progress: Callable[[int, int], None] | None = None

    def write(self, dtype: torch.dtype) -> tuple[Measure, str, Entries]:
        """What was measured, the weights' sha256 and the manifest's entries; goes on where a run of this key ended."""
        keep_freed_memory()
        total, names = Measure(list(self.merger.experts)), list(self.merger.base.tensors)
        away = [name for name in names if self.merger.place(name, self.devices[0]) != "cpu"]
        jobs: dict[str, Future[tuple[list[Tensor], Measure]]] = {}
        streams = _streams(self.devices if away else [])
        self.merger.prepare(self.devices[0])  # before the threads ask for it

        def parts_of(name: str) -> Iterator[Tensor]:
            if name in away:
                first = away.index(name)
                for i in range(first, min(first + len(self.devices), len(away))):
                    if away[i] not in jobs:
                        turn = i % len(self.devices)
                        jobs[away[i]] = pool.submit(self._merged, away[i], dtype, self.devices[turn], streams[turn])
                parts, own = jobs[name].result()
                jobs[name] = Future()  # done, and its memory with it
                yield from parts
            else:
                own = Measure(total.experts)
                yield from self._measured(name, dtype, own)
            total.include(own)
            if self.progress is not None:
                self.progress(total.tensors, len(names))

        shapes = {name: info.shape for name, info in self.merger.base.tensors.items()}
        with ThreadPoolExecutor(len(self.devices)) as pool:
            try:
                sha256, files = write_weights(self.folder, shapes, dtype, parts_of, key=self.key, ledger=total)
            finally:
                pool.shutdown(cancel_futures=True)
        return total, sha256, files

    def loss(self, names: Sequence[str], dtype: torch.dtype) -> float:
        """The share of the update of these tensors that storing them in `dtype` loses."""
        self.merger.prepare(self.devices[0])
        total = Measure(list(self.merger.experts))
        for name in names:
            for _ in self._measured(name, dtype, total, self.merger.place(name, self.devices[0])):
                pass
        return total.storage_loss

    def _merged(
        self, name: str, dtype: torch.dtype, device: str, stream: torch.cuda.Stream | None
    ) -> tuple[list[Tensor], Measure]:
        own = Measure(list(self.merger.experts))
        with torch.cuda.stream(stream):
            return [part.cpu() for part in self._measured(name, dtype, own, device)], own

    def _measured(self, name: str, dtype: torch.dtype, measure: Measure, device: str = "cpu") -> Iterator[Tensor]:
        for number, (base, experts, merged) in enumerate(self.merger.parts(name, device)):
            stored = cast(merged, dtype, self.rounding, f"{name} {number}" if number else name)
            measure.add(base, experts, merged, stored)
            if self.merger.base.finite and not measure.lost < float("inf"):
                raise NumericsError(f"tensor '{name}': values overflow {word_of(dtype)}; use dtype=float32")
            yield stored


def _streams(devices: Sequence[str]) -> list[torch.cuda.Stream | None]:
    """A stream for each turn: on one for both the copy of the next tensor would wait for the merge of this one."""
    gpus = [device for device in devices if torch.device(device).type == "cuda"]
    for device in gpus:
        # CUDA's linear algebra is loaded by the first call, which fails where two threads make it at once.
        torch.linalg.inv(torch.eye(2, device=device))
    return [torch.cuda.Stream(device) if device in gpus else None for device in devices]
