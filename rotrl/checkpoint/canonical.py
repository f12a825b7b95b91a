"""Experts in the gauge that brings them nearest to the base: other weights, the same function.

Experts of one base hardly need it (the rotations found are about I); models that do were not trained from this base.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError
from rotrl.linalg.gauge import State, nearest_gauge

MOVED = re.compile(
    r"^model\.layers\.(\d+)\.(?:self_attn\.[qkvo]_proj\.weight|self_attn\.[qkv]_proj\.bias|mlp\.(?:gate|up|down)_proj\.weight)$"
)
# With a norm of queries and keys, or biases of the MLP, these are no gauges.
OTHERWISE = re.compile(r"\.(?:q_norm|k_norm)\.weight$|\.mlp\.\w+\.bias$")


def canonicalize(expert: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The expert with, in each layer, the values of every KV group, the RoPE planes of queries and keys, and the order
    and scale of the MLP's neurons chosen nearest to the base's (`linalg.gauge.nearest_gauge`); in float32, made layer
    by layer while it is read. The residual stream is left: its gains would have to be folded. CheckpointError for
    other layers than those of Qwen2 and Llama.
    """
    moved = {name: int(found[1]) for name in expert.tensors if (found := MOVED.match(name))}
    layers = {layer: [name for name in moved if moved[name] == layer] for layer in moved.values()}
    strange = [name for name in expert.tensors if OTHERWISE.search(name)]
    if strange or not layers or any(sum(name.endswith("weight") for name in names) != 7 for names in layers.values()):
        told = f"'{strange[0]}' is there" if strange else "q, k, v, o, gate, up, down are not all there in each layer"
        raise CheckpointError(f"{expert.path}: {told}; models.canonicalize knows the layers of Qwen2 and Llama")
    width = expert.config.get("head_dim") or expert.config["hidden_size"] // expert.config["num_attention_heads"]
    gauge = _Gauge(expert, base, layers, width)
    tensors = {
        name: replace(info, dtype=torch.float32, stored=info.stored or name) if name in moved else info
        for name, info in expert.tensors.items()
    }
    derived = {**expert.derived, **{name: _Part(gauge, name, layer) for name, layer in moved.items()}}
    return replace(expert, tensors=tensors, derived=derived, stamps={**base.stamps, **expert.stamps})


@dataclass
class _Gauge:
    expert: Checkpoint
    base: Checkpoint
    layers: dict[int, list[str]]
    width: int
    made: tuple[int, State] = field(default=(-1, {}))  # tensors are read in order: one layer at a time is kept

    def layer(self, number: int) -> State:
        if self.made[0] != number:
            models = (self.expert, self.base)
            own, target = ({name: model.view(name).float() for name in self.layers[number]} for model in models)
            self.made = number, nearest_gauge(own, target, number, self.width)
        return self.made[1]


@dataclass(frozen=True)
class _Part:
    gauge: _Gauge
    name: str
    layer: int

    def __call__(self, _: Tensor) -> Tensor:
        return self.gauge.layer(self.layer)[self.name]
