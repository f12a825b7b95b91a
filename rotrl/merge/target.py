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


def check_target(
    target: Path, models: Sequence[Checkpoint], inputs: Mapping[str, Any], *, overwrite: bool = False
) -> dict[str, Any] | None:
    """The manifest of a merge from these `inputs`, or some of them, at `target`; None if the way is free.

    ConfigError where a model is there, or files that are no merge, or, unless `overwrite`, another merge.
    """
    here = target.resolve()
    for model in models:
        if here == model.path.resolve() or here in model.path.resolve().parents:
            raise ConfigError(f"{target}: the model {model.path} is there; choose another output")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / MANIFEST).exists():
        raise ConfigError(f"{target}: holds files that rotrl did not write; choose another output")
    manifest = valid_manifest(target)
    if manifest is None and not overwrite:
        raise ConfigError(f"{target}: holds a merge with absent or changed files; use overwrite=true to make it again")
    made = (manifest or {}).get("inputs", {})
    changed = list(_changed({key: made.get(key) for key in inputs}, json.loads(json.dumps(inputs))))
    if changed and not overwrite:
        told = ", ".join(changed)
        raise ConfigError(f"{target}: holds another merge (other {told}); use overwrite=true or another output")
    return None if changed else manifest


def reusable(
    target: Path, inputs: Mapping[str, Any], models: Sequence[Checkpoint], *, overwrite: bool = False
) -> dict[str, Any] | None:
    """The manifest of an equal merge at `target`, None if the way is free; ConfigError names what is in it."""
    manifest = check_target(target, models, inputs, overwrite=overwrite)
    return manifest if manifest and manifest["fingerprint"] == fingerprint(inputs) else None


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
