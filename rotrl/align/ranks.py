"""One fit on several devices: the same call in one process for each, its ranks, which Lightning's DDP joins."""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from rotrl.errors import ConfigError, RotrlError

Progress = Callable[[int, int], None]
LAST = 2.0  # seconds that the others have to end by themselves once a rank has failed


def is_rank() -> bool:
    """Whether this process is one of several that were started together, by `in_ranks` or as tasks of a Slurm step."""
    return "LOCAL_RANK" in os.environ or slurm_tasks() > 1


def slurm_tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def devices_of(trainer: Mapping[str, Any]) -> int:
    """How many devices the settings of a Trainer ask for, without asking Lightning; 0 where it is not to be told."""
    devices = trainer.get("devices", 1)
    if devices in ("auto", -1, "-1"):
        return torch.cuda.device_count() or 1
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    try:
        return len(devices.split(",")) if "," in str(devices) else int(devices)
    except ValueError:
        return 0


def in_ranks(call: Callable[..., dict[str, Any]], count: int, progress: Progress | None) -> dict[str, Any]:
    """`call(progress=...)` in `count` spawned processes; gives what it returns in rank 0, whose progress is told.

    A RotrlError of a rank is raised here, ConfigError for a rank that was killed. No process outlives this call.
    """
    from lightning_fabric.plugins.environments.lightning import find_free_network_port

    told = torch.multiprocessing.get_context("spawn").SimpleQueue()
    given = (call, count, find_free_network_port(), told)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # in the ranks, until they are on their own
    try:
        started = start_processes(_rank, given, nprocs=count, join=False, start_method="spawn")
    finally:
        signal.signal(signal.SIGINT, ignored)
    ranks: list[Any] = started.processes if started else []
    heard: dict[str, Any] = {}
    try:
        while _running(ranks):
            wait([rank.sentinel for rank in ranks if rank.exitcode is None], timeout=0.1)
            _listen(told, heard, progress)
        wait([rank.sentinel for rank in ranks if rank.exitcode is None], timeout=LAST)
        _listen(told, heard, progress)
        if any(rank.exitcode for rank in ranks):
            raise _reason([rank.exitcode for rank in ranks], heard)
        return heard["result"]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def leave_at_exit() -> None:
    """Has a task of a Slurm step leave the group of its ranks when it ends, which Lightning does of NCCL's alone.

    A process that ends within one may be aborted by its threads (pytorch issue 190489).
    """
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _running(ranks: list[Any]) -> bool:
    codes = [rank.exitcode for rank in ranks]
    return None in codes and not any(codes)


def _listen(told: Any, heard: dict[str, Any], progress: Progress | None) -> None:
    while not told.empty():
        kind, value = told.get()
        if kind != "step":
            heard.setdefault(kind, value)
        elif progress:
            progress(*value)


def _reason(codes: list[int | None], heard: dict[str, Any]) -> Exception:
    """What ended the ranks: an error that the user can mend, else a signal, else a bug."""
    if "error" in heard:
        return heard["error"]
    for number, code in enumerate(codes):
        if code is not None and code < 0:
            told = f"rank {number} of {len(codes)} was ended by {signal.Signals(-code).name}"
            return ConfigError(
                f"trainer.devices: {told}, perhaps for want of memory; the same command continues, or give a smaller "
                "align.batch or fewer devices"
            )
    return RuntimeError(f"a rank of the fit failed\n{heard.get('bug', '')}")


def _rank(number: int, call: Callable[..., dict[str, Any]], count: int, port: int, told: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it at once, in a collective too
    os.environ |= {"LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        result = call(progress=(lambda done, total: told.put(("step", (done, total)))) if number == 0 else None)
    except Exception as error:
        told.put(("error", error) if isinstance(error, RotrlError) else ("bug", traceback.format_exc()))
        sys.exit(1)
    finally:
        _leave()
    if number == 0:
        told.put(("result", result))
