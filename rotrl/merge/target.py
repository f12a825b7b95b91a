"""What may be written where: a finished merge is reused, anything else is replaced only on request, models never."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.staging import abandoned
from rotrl.checkpoint.writer import MANIFEST, valid_manifest
from rotrl.errors import ConfigError


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Digest of everything that the bytes of a merge depend on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def check_target(target: Path, models: Sequence[Checkpoint]) -> None:
    """ConfigError where a merge would stand in the way of a model or of files that are no merge."""
    here = target.resolve()
    for model in models:
        if here == model.path.resolve() or here in model.path.resolve().parents:
            raise ConfigError(f"{target}: the model {model.path} is there; choose another output")
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not empty and not (target / MANIFEST).exists():
        raise ConfigError(f"{target}: holds files that rotrl did not write; choose another output")


def reusable(
    target: Path, inputs: Mapping[str, Any], models: Sequence[Checkpoint], *, overwrite: bool = False
) -> dict[str, Any] | None:
    """The manifest of an equal merge at `target`, None if the way is free; ConfigError names what is in it."""
    check_target(target, models)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    manifest = valid_manifest(target)
    if manifest is not None and manifest.get("fingerprint") == fingerprint(inputs):
        return manifest
    if overwrite:
        return None
    if manifest is None:
        raise ConfigError(f"{target}: holds a merge with absent or changed files; use overwrite=true to make it again")
    changed = ", ".join(_changed(manifest.get("inputs", {}), inputs))
    raise ConfigError(f"{target}: holds another merge (other {changed}); use overwrite=true or another output")


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changed(before, after, f"{prefix}{key}.")
        elif before != after:
            yield prefix + key


def check_space(target: Path, needed: int) -> None:
    """ConfigError where fewer than `needed` bytes are free or held by what killed runs left beside the target.

    Of that a merge keeps the shards which it need not write again, and removes the rest.
    """
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    left = [file for old in abandoned(target) if old.suffix != ".old" for file in old.rglob("*") if file.is_file()]
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in left)
    if needed > free:
        raise ConfigError(f"{target}: the merge needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
