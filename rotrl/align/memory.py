"""What a fit holds on its device, counted on tensors without data: no weight is read."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rotrl.align.deltas import Directions, Free, LowRank
from rotrl.align.family import Family
from rotrl.align.frames import stiefel_family
from rotrl.align.low_rank import LowRankTurns
from rotrl.align.objective import CHUNK
from rotrl.align.parametrization import CayleyTurns
from rotrl.align.ranks import devices_of
from rotrl.align.trainer import frozen_dtype
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError

KINDS: dict[str, tuple[Callable[..., Family], tuple[str, ...]]] = {
    "stiefel": (stiefel_family, ("side", "block", "share")),
    "cayley": (CayleyTurns, ("side", "block", "share")),
    "low_rank": (LowRankTurns, ("side", "rank", "share")),
    "lora": (LowRank, ("rank",)),
    "free": (Free, ()),
}
FLOAT = 4  # bytes


def plan_memory(
    base: Checkpoint, teachers: Sequence[str], experts: Sequence[str], settings: Mapping[str, Any], trainer: Mapping
) -> dict[str, int]:
    """Bytes on each device by what they are for, of a fit with the keys of `align` and `trainer`; sequences are of
    `max_tokens`.

    An upper bound: everything that is held at some time of a step, together. Activations are what autograd keeps of
    one layer times their number, with attention that keeps no scores; without `max_tokens` prompts are not counted.
    ConfigError where the family can't be built.
    """
    dtype = frozen_dtype(trainer)
    model = sum(math.prod(info.shape) for info in base.tensors.values()) * dtype.itemsize
    family = paper_family(base, experts, settings)
    learned = sum(part.numel() for part in family.parameters()) * FLOAT
    buffers = sum(part.numel() for part in family.buffers()) * FLOAT
    stacks = [family.weights(index).numel() for index in range(len(family.shapes))]
    squares = settings.get("objective", "logits") != "logits"
    formed = FLOAT if squares else dtype.itemsize
    planned = {
        "frozen models": model * (1 + len(teachers)),
        "weights of the family": buffers,
        "parameters, gradients, moments": 4 * learned,
        "work of the optimiser": 4 * FLOAT * max((part.numel() for part in family.parameters()), default=0),
        "adapted weights, gradients": 2 * sum(stacks) * formed + 2 * FLOAT * max(stacks),
    }
    if squares:
        aims = len(teachers) if settings["objective"] == "activation" else 1
        planned["targets"] = aims * FLOAT * sum(stacks)
    if settings.get("objective") == "activation":
        planned["Gram matrices"] = len(teachers) * FLOAT * sum(info.shape[1] ** 2 for info in _matrices(base).values())
    if settings.get("objective", "logits") == "logits":
        tokens = settings["max_tokens"] or settings["samples"]["sampling"]["max_tokens"]
        try:
            config = AutoConfig.from_pretrained(base.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{base.path}: transformers can't read config.json ({error})") from error
        shape = (-(-settings["batch"] // devices_of(trainer)), tokens)
        kept = activations(config, shape, dtype, recompute=settings["gradient_checkpointing"])
        planned["activations"] = len(teachers) * kept  # one backward pass goes through the batches of all
        planned["logits"] = CHUNK * (2 * dtype.itemsize + 4 * FLOAT)
    return planned


def paper_family(base: Checkpoint, experts: Sequence[str], settings: Mapping[str, Any]) -> Family:
    """The family of a configuration in the shapes of the base; ConfigError where it can't be built."""
    matrices = {name: torch.empty(info.shape, device="meta") for name, info in _matrices(base).items()}
    name = settings["_target_"].rpartition(".")[2].replace("procrustes", "stiefel")  # the same rotations
    if name in KINDS:
        kind, keys = KINDS[name]
        return kind(matrices, **{key: settings[key] for key in keys})
    directions = experts if name == "coefficients" else ("alpha", "beta")
    return Directions(matrices, dict.fromkeys(directions, matrices))


def activations(config: Any, shape: tuple[int, int], dtype: torch.dtype, *, recompute: bool) -> int:
    """Bytes that autograd keeps of the decoder for ids of `shape`; with `recompute` one layer and the inputs of all."""
    one, two = (_kept(config, layers, shape, dtype) for layers in (1, 2))
    layers, layer = config.num_hidden_layers, two - one
    if recompute:
        return one + layers * shape[0] * shape[1] * config.hidden_size * dtype.itemsize
    return one + (layers - 1) * layer


def _kept(config: Any, layers: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
    with FakeTensorMode():
        short = copy.deepcopy(config)
        short.num_hidden_layers = layers
        if getattr(short, "layer_types", None):
            short.layer_types = short.layer_types[:layers]
        model = AutoModelForCausalLM.from_config(short, dtype=dtype).eval().requires_grad_(False)
        return kept_bytes(model, torch.zeros(shape, dtype=torch.long))


def kept_bytes(model: PreTrainedModel, ids: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass of the decoder whose matrices learn, weights not counted."""
    named = dict(model.base_model.named_parameters())
    lent = {n: p.detach().clone().requires_grad_() for n, p in named.items() if role_of(n, p.shape).is_matrix}
    weights = {part.untyped_storage()._cdata for part in (*named.values(), *model.buffers(), *lent.values())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(model.base_model, lent, kwargs={"input_ids": ids, "use_cache": False})
    return sum(part.untyped_storage().nbytes() for storage, part in kept.items() if storage not in weights)


def _matrices(base: Checkpoint) -> dict[str, Any]:
    return {name: info for name, info in base.tensors.items() if role_of(name, info.shape).is_matrix}
