"""Roles by the names that real checkpoints use."""

import pytest

from rotrl.checkpoint.layout import MATRICES, Role, role_of


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (16, 16), Role(0, "q")),
        ("model.layers.11.self_attn.k_proj.weight", (4, 16), Role(11, "k")),
        ("model.layers.1.self_attn.v_proj.weight", (4, 16), Role(1, "v")),
        ("model.layers.1.self_attn.o_proj.weight", (16, 16), Role(1, "o")),
        ("model.layers.1.mlp.gate_proj.weight", (24, 16), Role(1, "gate")),
        ("model.layers.1.mlp.up_proj.weight", (24, 16), Role(1, "up")),
        ("model.layers.1.mlp.down_proj.weight", (16, 24), Role(1, "down")),
        ("model.layers.1.self_attn.q_proj.bias", (16,), Role(1, "bias")),
        ("model.layers.1.self_attn.q_norm.weight", (4,), Role(1, "norm")),
        ("model.layers.1.input_layernorm.weight", (16,), Role(1, "norm")),
        ("model.layers.1.post_attention_layernorm.weight", (16,), Role(1, "norm")),
        ("model.norm.weight", (16,), Role(None, "norm")),
        ("model.embed_tokens.weight", (32, 16), Role(None, "embedding")),
        ("lm_head.weight", (32, 16), Role(None, "head")),
        ("model.layers.1.self_attn.qkv_proj.weight", (24, 16), Role(1, "qkv")),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", (8,), Role(1, "other")),
        ("model.layers.1.self_attn.q_proj.weight", (4, 4, 1), Role(1, "other")),
    ],
)
def test_role(name, shape, role):
    assert role_of(name, shape) == role
    assert role.is_matrix == (role.module in (*MATRICES, "qkv"))
