"""Frozen transformers models: the student with the source's weights, the teachers with their own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from rotrl.align.source import Problem
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError, ConfigError


def load_models(
    base: Checkpoint, problem: Problem, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """(student, teachers) on the CPU. The student has the base's architecture and every tensor of the source."""
    student = load_model(base, dtype)
    _fill(student, problem.state, base)
    return student, {name: load_model(teacher, dtype) for name, teacher in problem.teachers.items()}


def recompute_layers(model: PreTrainedModel) -> None:
    """Activations of a decoder layer are computed again in the backward pass instead of kept.

    Not transformers' own: that recomputes with the weights that the module holds by then, while `functional_call` has
    lent it others for the forward pass.
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ConfigError(f"align.gradient_checkpointing: {type(model).__name__} has no `layers`; set it to false")
    for layer in layers:
        layer.forward = partial(_recomputed, layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    lent: dict[str, Tensor] = dict(layer.named_parameters())

    def run(*args: Any, **kwargs: Any) -> Any:
        layer.forward = forward
        try:
            return functional_call(layer, lent, args, kwargs)
        finally:
            layer.forward = partial(_recomputed, layer, forward)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a checkpoint; CheckpointError where there is none for it."""
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: transformers can't load it ({error}); check config.json") from error


def _fill(model: PreTrainedModel, state: dict[str, Tensor], base: Checkpoint) -> None:
    own = model.state_dict()
    if unknown := [name for name in state if name not in own]:
        raise CheckpointError(f"{base.path}: tensor '{unknown[0]}' has no place in {type(model).__name__}; remove it")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
