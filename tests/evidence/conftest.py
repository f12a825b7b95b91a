"""Small Qwen2-shaped checkpoints on disk, made from a dict of tensors."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rotrl.checkpoint.reader import open_checkpoint

LAYERS, HIDDEN, MIDDLE, KV, VOCAB = 4, 24, 48, 8, 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}


class Family:
    """State dicts of one architecture, and their checkpoints on disk."""

    def __init__(self, folder):
        self.folder = folder

    def weights(self, seed, scale=1.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return scale * torch.randn(*shape, generator=generator)

        state = {
            f"model.layers.{layer}.{name}.weight": draw(*shape)
            for layer in range(LAYERS)
            for name, shape in SHAPES.items()
        }
        state |= {f"model.layers.{layer}.input_layernorm.weight": draw(HIDDEN) for layer in range(LAYERS)}
        return state | {"model.embed_tokens.weight": draw(VOCAB, HIDDEN)}

    def moved(self, base, seed, scale=0.05):
        """`base` plus an isotropic update of its own."""
        update = self.weights(seed, scale)
        return {name: tensor + update[name] for name, tensor in base.items()}

    def matrices(self, base, change):
        """`base` with change(W, index) in place of each matrix."""
        names = [name for name in base if "_proj." in name]
        return base | {name: change(base[name], i) for i, name in enumerate(names)}

    def save(self, name, state):
        folder = self.folder / name
        folder.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
        config = {"model_type": "qwen2", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
        (folder / "config.json").write_text(json.dumps(config))
        return open_checkpoint(folder)


@pytest.fixture
def family(tmp_path):
    return Family(tmp_path)
