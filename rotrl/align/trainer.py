"""Lightning's Trainer as a guest: silent, leaving one checkpoint, and Ctrl-C stays Ctrl-C."""

import difflib
import inspect
import logging
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from rotrl.align.module import LogitAlignment
from rotrl.align.ranks import Progress, devices_of, is_rank, slurm_tasks
from rotrl.errors import ConfigError

CHECKPOINT = "align.ckpt"
OWN = ("max_steps", "max_epochs", "min_steps", "min_epochs", "max_time", "callbacks", "default_root_dir")
SMALL = 1 << 18  # elements of a matrix
STRATEGIES = ("auto", "ddp_spawn")  # plain ddp would start the whole program again for each device
PRECISIONS = ("32-true", "bf16-mixed")


class _Look(pl.Callback):
    """Early stop as a callback: it runs before the checkpoint of the step is written, Lightning's validation after.

    A fit that is resumed from the checkpoint of its stop is over before its first step.
    """

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if isinstance(module, LogitAlignment):
            trainer.should_stop = module.is_over()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if isinstance(module, LogitAlignment) and module.is_due(trainer.global_step):
            trainer.should_stop = module.look(trainer.global_step)


class _Report(pl.Callback):
    def __init__(self, progress: Progress):
        self.progress = progress

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.progress(trainer.global_step, trainer.max_steps)


def make_trainer(
    settings: Mapping[str, Any],
    out: Path,
    *,
    steps: int = 1,
    checkpoint_every: int = 1,
    progress: Progress | None = None,
) -> pl.Trainer:
    """A Trainer for `steps` optimiser steps that keeps `out/align.ckpt`; `settings` are its own keyword arguments.

    In one of several ranks it is their DDP; elsewhere it may be asked for its devices and no more, if they are several.
    """
    check_settings(settings)
    keep = ModelCheckpoint(
        dirpath=out,
        filename=Path(CHECKPOINT).stem,
        every_n_train_steps=checkpoint_every,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    # Validation brackets the fit and is not part of it.
    fixed = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 1.0, "val_check_interval": None}
    if is_rank():
        # The frozen weights among the buffers are the same everywhere; what starts the ranks beats what Slurm says.
        own = None if slurm_tasks() > 1 else LightningEnvironment()
        joined = DDPStrategy(cluster_environment=own, broadcast_buffers=False, gradient_as_bucket_view=True)
        fixed |= {"strategy": joined, "use_distributed_sampler": False}
    callbacks: list[pl.Callback] = [keep, _Look(), *([_Report(progress)] if progress else [])]
    arguments = {**silent, **settings, **fixed}
    try:
        trainer = pl.Trainer(**arguments, callbacks=callbacks, default_root_dir=out, check_val_every_n_epoch=10**9)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}; mend the trainer's keys") from error
    return trainer


def one_device(settings: Mapping[str, Any]) -> dict[str, Any]:
    """For what is not shared among devices."""
    return {**settings, "devices": 1, "strategy": "auto"}


def check_settings(settings: Mapping[str, Any]) -> None:
    """ConfigError for what Lightning does not know and for what would break a Riemannian step in silence, all at
    once."""
    known = [name for name in inspect.signature(pl.Trainer).parameters if name not in OWN]
    faults = []
    for key in settings:
        if key in OWN:
            faults.append(f"trainer.{key} is set by align; use align.steps")
        elif key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            faults.append(f"trainer.{key} is no argument of Lightning's Trainer{hint}")
    strategy = str(settings.get("strategy", "auto"))
    if any(word in strategy.lower() for word in ("fsdp", "deepspeed", "parallel")):
        faults.append(
            f"trainer.strategy={strategy!r} shards parameters, and a Riemannian step on a shard is Euclidean (off "
            "the manifold at once); use strategy=ddp_spawn"
        )
    elif strategy not in STRATEGIES and not is_rank():
        faults.append(f"trainer.strategy={strategy!r}; one of: {', '.join(STRATEGIES)}")
    if devices_of(settings) < 1:
        faults.append(f"trainer.devices={settings['devices']!r}; give a number of devices, a list of them or auto")
    if settings.get("num_nodes", 1) != 1 and not is_rank():
        faults.append(f"trainer.num_nodes={settings['num_nodes']}: one node's devices are used; set trainer.devices")
    if (precision := str(settings.get("precision", "32-true"))) not in PRECISIONS:
        faults.append(f"trainer.precision={precision!r}: rotations need float32; one of: {', '.join(PRECISIONS)}")
    if faults:
        raise ConfigError("; ".join(faults))


def frozen_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """Dtype of the frozen models; rotations and the products with them stay float32."""
    return torch.bfloat16 if settings.get("precision") == "bf16-mixed" else torch.float32


def fit(trainer: pl.Trainer, module: LogitAlignment, resume: Path | None) -> None:
    """Trains to the end, from a checkpoint if there is one, and leaves the family at its best."""
    with interruptible():
        trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
    module.take_best()


def measure(trainer: pl.Trainer, module: LogitAlignment) -> dict[str, float]:
    """KL per teacher on the held-out batches, of which there may be none."""
    if not module.heldout:
        return {}
    with interruptible():
        trainer.validate(module, verbose=False)
    return module.measured


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C leaves as KeyboardInterrupt: Lightning makes it an exit with code 1 and ignores SIGINT from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


@contextmanager
def threads_for(matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """One thread where all matrices are small: a second gains little there, and on cores that other work shares the
    threads wait for each other (5 to 25 times slower, measured on the tiny pair)."""
    before = torch.get_num_threads()
    if max(matrix.numel() for matrix in matrices.values()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's and transformers' notices off; errors still raise."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\b")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
