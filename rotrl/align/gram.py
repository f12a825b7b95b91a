"""Gram matrices of what each linear map of an expert reads on the expert's own samples, for regmean."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotrl.align.data import Rollout, read_rollouts
from rotrl.align.models import load_model
from rotrl.align.trainer import Progress, frozen_dtype, quiet, threads_for
from rotrl.checkpoint.grams import GRAMS
from rotrl.checkpoint.layout import Role, role_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.staging import AlreadyPublished, staging
from rotrl.checkpoint.writer import write_json, write_weights
from rotrl.errors import CheckpointError, NumericsError

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


def gather(
    expert: Checkpoint,
    rollouts: Path | Sequence[Rollout],
    target: Path,
    *,
    trainer: Mapping[str, Any],
    layers: int | None = None,
    batch: int = 16,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes `X^T X / tokens` (in, in; float32) of every linear map of attention and MLP to the folder `target`.

    X are the inputs of the map over all tokens of the samples. Maps that are given the very same tensor share an
    entry. The matrices of `layers` layers are in memory at a time, for each such group the samples are read again.
    CheckpointError where no matrix is a torch Linear, NumericsError where inputs are not finite.
    """
    samples = read_rollouts(rollouts, max_tokens=max_tokens) if isinstance(rollouts, Path) else rollouts
    device = "cuda" if torch.cuda.is_available() and trainer.get("accelerator") != "cpu" else "cpu"
    with quiet(), torch.inference_mode():
        model = load_model(expert, frozen_dtype(trainer)).eval().to(device)  # type: ignore[arg-type]
        maps = _linear_maps(expert, model)
        owners = _owners(model, maps, samples[0])
        entries = sorted({*owners.values()}, key=lambda name: (_role(expert, name).layer or 0, name))
        groups = _by_layers(expert, entries, layers)
        batches = list(_batches(samples, batch))
        held: dict[str, Tensor] = {}

        def tell(done: int) -> None:
            if progress:
                progress(done, len(groups) * len(batches))

        def take(name: str) -> Tensor:
            if name not in held:
                number = next(i for i, group in enumerate(groups) if name in group)
                group, before = {entry: maps[entry] for entry in groups[number]}, number * len(batches)
                held.update(_sums(model, group, batches, lambda done: tell(before + done)))
            return held.pop(name)

        widths = {name: maps[name].in_features for name in entries}
        tokens = sum(map(len, samples))
        with threads_for({n: m.weight for n, m in maps.items()}), suppress(AlreadyPublished), staging(target) as folder:
            shapes = {name: (width, width) for name, width in widths.items()}
            sha256, _ = write_weights(folder, shapes, torch.float32, lambda name: take(name).div_(tokens))
            told = {"entries": owners, "weights": expert.sha256, "tokens": tokens, "sha256": sha256}
            write_json(folder / GRAMS, told)


def _linear_maps(expert: Checkpoint, model: nn.Module) -> dict[str, nn.Linear]:
    """The modules of the matrices of attention and MLP, by the names of their weights."""
    modules = dict(model.named_modules())
    names = [name for name in expert.tensors if _role(expert, name).is_matrix]
    found = {name: modules.get(name.removesuffix(".weight")) for name in names}
    maps = {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
    if not maps:
        raise CheckpointError(
            f"{expert.path}: none of its matrices is a Linear of {type(model).__name__}, whose inputs regmean needs; "
            "choose another merge"
        )
    return maps


def _owners(model: nn.Module, maps: Mapping[str, nn.Linear], sample: Rollout) -> dict[str, str]:
    """The map that stands for each: the first of those, one after the other, that are given the very same tensor."""
    owners: dict[str, str] = {}
    last: tuple[Tensor | None, str] = (None, "")

    def note(name: str) -> Hook:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            nonlocal last
            last = last if given[0] is last[0] else (given[0], name)
            owners[name] = last[1]

        return hook

    with _hooks(maps, note):
        _read(model, torch.tensor([sample.prompt[:1]]))
    return owners


def _sums(
    model: nn.Module,
    maps: Mapping[str, nn.Linear],
    batches: Sequence[Tensor],
    tell: Callable[[int], None],
) -> dict[str, Tensor]:
    """`X^T X` of each map, summed over all tokens on the model's device."""
    sums = {name: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for name, m in maps.items()}

    def add(name: str) -> Hook:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].reshape(-1, given[0].shape[-1]).float()
            sums[name].addmm_(x.T, x)

        return hook

    with _hooks(maps, add):
        for done, ids in enumerate(batches, 1):
            _read(model, ids)
            tell(done)
    if wrong := [name for name, total in sums.items() if not total.isfinite().all()]:
        raise NumericsError(f"the inputs of '{wrong[0]}' are not finite on the samples; set trainer.precision=32-true")
    return {name: total.cpu() for name, total in sums.items()}


@contextmanager
def _hooks(maps: Mapping[str, nn.Linear], hook_of: Callable[[str], Hook]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(model: Any, ids: Tensor) -> None:
    """The decoder alone: nothing here asks for logits."""
    model.base_model(input_ids=ids.to(model.device), use_cache=False)


def _batches(samples: Sequence[Rollout], batch: int) -> Iterator[Tensor]:
    """Sequences of one length go together, so that no token is padding."""
    for _, alike in groupby(sorted(samples, key=len), key=len):
        yield from torch.tensor([sample.prompt + sample.completion for sample in alike]).split(batch)


def _by_layers(expert: Checkpoint, entries: Sequence[str], layers: int | None) -> list[list[str]]:
    """The entries of `layers` layers at a time."""
    by_layer = [list(group) for _, group in groupby(entries, key=lambda name: _role(expert, name).layer)]
    size = layers or len(by_layer)
    return [list(chain(*by_layer[start : start + size])) for start in range(0, len(by_layer), size)]


def _role(expert: Checkpoint, name: str) -> Role:
    return role_of(name, expert.tensors[name].shape)
