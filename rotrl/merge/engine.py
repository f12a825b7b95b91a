"""Streams a merge: per tensor read, merge, cast, write, measure."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rotrl
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.header import word_of
from rotrl.checkpoint.reader import Checkpoint, check_unchanged
from rotrl.checkpoint.rounding import ROUNDINGS
from rotrl.checkpoint.sidecar import copy_sidecars, model_name, sidecar_digest, write_card, write_config
from rotrl.checkpoint.staging import AlreadyPublished, staging
from rotrl.checkpoint.writer import Entries, write_manifest
from rotrl.errors import ConfigError
from rotrl.merge.measure import Measure
from rotrl.merge.merger import Merger
from rotrl.merge.method import Method
from rotrl.merge.plan import dtype_of, plan_merge, stored_dtype
from rotrl.merge.stream import Stream, devices
from rotrl.merge.target import check_space, fingerprint, reusable

LOSS_LIMIT = 0.01
PROBES = 8
NUMBERS = 8  # raised whenever the same configuration gives other numbers than before


def merge_state(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    method: Method,
    rotations: Path | None = None,
    grams: Mapping[str, Path] | None = None,
) -> dict[str, Tensor]:
    """The merged tensors in the method's precision, all in memory."""
    merger = Merger(base, experts, method, rotations, grams)
    return {name: torch.cat([merged for _, _, merged in merger.parts(name)]) for name in base.tensors}


def merge(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    method: Method,
    target: Path,
    *,
    dtype: str = "auto",
    rounding: str = "nearest",
    rotations: Path | None = None,
    grams: Mapping[str, Path] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the merged checkpoint to `target`, or reuses what is there from the same inputs.

    `dtype` auto is the base's where storing loses less than 1 % of the update, else float32. `rounding` stochastic
    keeps the mean of updates smaller than the dtype's steps. `device` (auto: all GPUs, else cpu) is where matrices are
    merged; vectors and work by rows take less time than their way to a GPU. A run that was killed goes on after its
    last whole shard, if that was made on the same kind of device. Gives path, sha256, fingerprint, reused, seconds,
    dtype, effective_coefficient (along sum d_i), coefficients (per expert, least squares), norm_ratio
    (|d| / mean |d_i|), storage_loss, warnings.
    """
    begun, target = time.monotonic(), Path(target)
    if dtype != "auto":
        dtype_of(dtype)
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding is {rounding!r}, one of {', '.join(ROUNDINGS)} is expected")
    where = devices(device)
    merger = Merger(base, experts, method, rotations, grams)
    inputs, models = _inputs(merger, dtype, rounding, rotations), [base, *experts.values()]
    manifest = reusable(target, inputs, models, overwrite=overwrite)
    reused = manifest is not None
    if manifest is None:
        plan = plan_merge(base, experts, method, dtype=dtype)
        check_space(target, plan["bytes"])
        try:
            manifest = _publish(
                target,
                merger,
                inputs,
                where,
                overwrite=overwrite,
                warnings=plan["warnings"],
                progress=progress,
            )
        except AlreadyPublished:
            manifest, reused = reusable(target, inputs, models), True
    if manifest is None:
        raise ConfigError(f"{target}: came and went while it was written; choose an output that no other run uses")
    told = ("fingerprint", "dtype", "effective_coefficient", "coefficients", "norm_ratio", "storage_loss", "warnings")
    return {
        "path": str(target),
        "sha256": manifest["weights_sha256"],
        "reused": reused,
        "seconds": time.monotonic() - begun,
        **{key: manifest[key] for key in told},
    }


def _publish(
    target: Path,
    merger: Merger,
    inputs: Mapping[str, Any],
    where: Sequence[str],
    *,
    overwrite: bool,
    warnings: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Writes weights, sidecars, card and, last, the manifest, which it gives."""
    models = [merger.base, *merger.experts.values()]
    notes = [*warnings, *merger.notes]
    # Shards that a GPU made are not those of a processor to the last bit: a merge is continued on its kinds alone.
    places = {merger.place(name, where[0]) for name in merger.base.tensors}
    key = f"{fingerprint(inputs)} {' '.join(sorted({torch.device(place).type for place in places}))}"
    with staging(target, overwrite=overwrite, key=key) as folder:
        stream = Stream(folder, merger, inputs["rounding"], where, key, progress)
        dtype, measure, sha256, files = _write(stream, inputs["dtype"], notes)
        copy_sidecars(merger.base, folder, dtype)
        names = [model_name(model.given, commit=True) for model in models]
        configuration = write_config(folder, {**inputs, "names": names})
        facts = {
            "stored in": f"{word_of(dtype)}, which loses {measure.storage_loss:.2g} of the update",
            "effective coefficient": f"{measure.effective_coefficient:.3g}",
            "update over mean expert update": f"{measure.norm_ratio:.3g}",
            "weights sha256": sha256,
        }
        write_card(
            folder,
            title=target.absolute().name,
            method=merger.method.name,
            models=models,
            configuration=configuration,
            facts=facts,
            warnings=notes,
        )
        content = {
            "rotrl": rotrl.__version__,
            "fingerprint": fingerprint(inputs),
            "inputs": inputs,
            "weights_sha256": sha256,
            "dtype": word_of(dtype),
            "effective_coefficient": measure.effective_coefficient,
            "coefficients": measure.coefficients,
            "norm_ratio": measure.norm_ratio,
            "storage_loss": measure.storage_loss,
            "warnings": notes,
        }
        check_unchanged(models)
        write_manifest(folder, files, content)
    return content


def _write(stream: Stream, dtype: str, notes: list[str]) -> tuple[torch.dtype, Measure, str, Entries]:
    """The weights in the first dtype that keeps the update, judged on a few tensors, then on all."""
    merger = stream.merger
    stored = stored_dtype(merger.base) if dtype == "auto" else dtype_of(dtype)
    if dtype == "auto" and stored.itemsize == 2:
        judged = [name for name in merger.acted if not merger.in_span(name)] or merger.acted
        probes = judged[:: math.ceil(len(judged) / PROBES)]
        loss = stream.loss(probes, stored)
        if loss < LOSS_LIMIT:
            measure, sha256, files = stream.write(stored)
            if (loss := measure.storage_loss) < LOSS_LIMIT:
                return stored, measure, sha256, files
        notes.append(f"stored in float32: {word_of(stored)} would lose {loss:.2g} of the update")
    if dtype == "auto":
        stored = torch.float32
    measure, sha256, files = stream.write(stored)
    if measure.storage_loss >= LOSS_LIMIT:
        notes.append(f"{word_of(stored)} loses {measure.storage_loss:.2g} of the update; dtype=float32 keeps it")
    notes += [f"expert {name} equals the base" for name in merger.experts if not measure.norm_of(name)]
    return stored, measure, sha256, files


def _inputs(merger: Merger, dtype: str, rounding: str, rotations: Path | None) -> dict[str, Any]:
    """Everything that the bytes of the merge depend on, by content."""
    with ThreadPoolExecutor(2) as pool:
        hashes = pool.map(lambda model: model.sha256, [merger.base, *merger.experts.values()])
    return {
        "base": next(hashes),
        "experts": [[name, next(hashes)] for name in merger.experts],
        "merge": merger.method.config,
        "dtype": dtype,
        "rounding": rounding,
        "rotations": file_sha256(rotations) if rotations and merger.rotations else None,
        **({"given": {name: file_sha256(file.path) for name, file in merger.given.items()}} if merger.given else {}),
        **({"grams": {name: grams.sha256 for name, grams in merger.grams.items()}} if merger.grams else {}),
        "sidecars": sidecar_digest(merger.base),
        "numbers": NUMBERS,
    }
