"""Frozen transformers models: the student with the source's weights, the teachers with their own."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rotrl.align.source import Problem
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError


def load_models(
    base: Checkpoint, problem: Problem, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """(student, teachers) on the CPU. The student has the base's architecture and every tensor of the source."""
    student = load_model(base, dtype)
    _fill(student, problem.state, base)
    return student, {name: load_model(teacher, dtype) for name, teacher in problem.teachers.items()}


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
