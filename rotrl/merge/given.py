"""Files of rotations that a merge applies: whether they fit the models, all that headers can tell."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.rotations import SIDES, RotationsFile, open_rotations
from rotrl.errors import CheckpointError, ConfigError


def faults(file: RotationsFile, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Iterator[str]:
    """What does not fit: names and shapes of the tensors, and the weights that the file was made for."""
    for name, sides in file.sides.items():
        info = base.tensors.get(name)
        if info is None:
            yield f"'{name}' is no tensor of the base"
            continue
        expected: dict[str, int] = dict(zip(SIDES, info.shape, strict=False))
        for side, shape in sides.items():
            if shape[0] == shape[1] and shape[0] != expected.get(side):
                yield f"'{name}.{side}' turns {shape[0]} dimensions, the tensor has {expected.get(side)}"
            if shape[0] != shape[1] and shape != tuple(info.shape):
                yield f"'{name}.{side}' is a frame of shape {list(shape)}, the tensor has {list(info.shape)}"
    for name, shape in file.deltas.items():
        info = base.tensors.get(name)
        if info is None or tuple(info.shape) != shape:
            there = "none of that name" if info is None else f"one of {list(info.shape)}"
            yield f"'{name}.delta' has shape {list(shape)}, the base has {there}"
    models = {"base": base, **experts}
    for name, sha256 in json.loads(file.metadata.get("inputs", "{}")).items():
        if name in models and models[name].sha256 != sha256:
            yield f"it was made for other weights of {name}"


def open_fitting(path: Path | str, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> RotationsFile:
    """The file; CheckpointError lists all that does not fit."""
    file = open_rotations(path)
    if found := list(faults(file, base, experts)):
        raise CheckpointError(f"{path}: {'; '.join(found)}; run the alignment again")
    return file


def open_given(
    files: Mapping[str, str], base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> dict[str, RotationsFile]:
    """`merge.rotations` opened: by expert, rotations of the base towards it, on one and the same side of each tensor.

    Whom a file leads to is told by the weights in its metadata, whatever the names were, and is checked for `experts`.
    ConfigError lists all faults.
    """
    opened, problems = {}, []
    for expert, path in files.items():
        try:
            file = opened[expert] = open_rotations(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        hashes = json.loads(file.metadata.get("inputs", "{}"))
        teachers = json.loads(file.metadata.get("teachers", "[]"))
        found = list(faults(file, base, {}))
        if file.deltas:
            found.append("it holds no rotations; learn them by align=stiefel, cayley, low_rank or procrustes")
        if file.source != {"model": "base"}:
            found.append("it does not turn the base; learn it with align.source=base")
        if expert in experts and hashes and {hashes.get(name) for name in teachers} - {experts[expert].sha256}:
            found.append(f"it leads to {', '.join(teachers)}; learn one towards {expert} alone, of these weights")
        problems += [f"{path}: {fault}" for fault in found]
    sides: dict[str, set[str]] = {}
    for file in opened.values():
        for name, turned in file.sides.items():
            sides.setdefault(name, set()).update(turned)
    if two := [name for name, turned in sides.items() if len(turned) > 1]:
        problems.append(f"'{two[0]}' is turned on both sides, by one file or by two; learn all with one align.side")
    if problems:
        raise ConfigError("; ".join(f"merge.rotations: {problem}" for problem in problems))
    return opened


def from_samples(files: Mapping[str, str]) -> bool:
    """Whether any of the files was learned from samples of the experts, not from weights alone."""
    return any(open_rotations(path).metadata.get("objective") in ("logits", "activation") for path in files.values())
