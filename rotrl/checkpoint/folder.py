"""A checkpoint that exists only as a way of reading (an adapter on its base, padded rows) as a folder for engines."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rotrl.checkpoint.reader import Checkpoint, check_unchanged, open_checkpoint
from rotrl.checkpoint.sidecar import copy_sidecars
from rotrl.checkpoint.staging import AlreadyPublished, staging
from rotrl.checkpoint.writer import valid_manifest, write_manifest, write_weights


def stands_in_a_folder(model: Checkpoint) -> bool:
    """Whether the model's own folder holds what is read of it."""
    return not model.derived and not any(info.stored for info in model.tensors.values())


def on_disk(model: Checkpoint, cache: Path) -> Checkpoint:
    """The model itself where its folder holds what it reads; else a copy, written once to `cache` by weight hash.

    The copy has one dtype, the widest of the model's.
    """
    if stands_in_a_folder(model):
        return model
    target = Path(cache) / "models" / model.sha256[:16]
    if valid_manifest(target) is None:
        dtype = max((info.dtype for info in model.tensors.values()), key=lambda dtype: dtype.itemsize)
        shapes = {name: info.shape for name, info in model.tensors.items()}
        with suppress(AlreadyPublished), staging(target, overwrite=True) as folder:
            sha256, files = write_weights(folder, shapes, dtype, lambda name: model.read(name).to(dtype))
            copy_sidecars(model, folder, dtype)
            check_unchanged([model])
            write_manifest(folder, files, {"weights_sha256": sha256})
    return replace(open_checkpoint(target), finite=model.finite, tokenizer=model.tokenizer, origin=model.given)
