"""Roles of every parameter of real architectures, tiny and on the meta device."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rotrl.checkpoint.family import notes
from rotrl.checkpoint.header import TensorInfo
from rotrl.checkpoint.layout import by_structure, role_of
from rotrl.checkpoint.reader import Checkpoint

SEVEN = {"q", "k", "v", "o", "gate", "up", "down"}
FUSED = {"qkv", "o", "gate_up", "down"}
TINY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
}  # fmt: skip


def shapes_of(model_type: str, **settings: object) -> dict[str, tuple[int, ...]]:
    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    return {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}


@pytest.mark.parametrize(
    ("model_type", "matrices"),
    [("qwen2", SEVEN), ("qwen3", SEVEN), ("llama", SEVEN), ("mistral", SEVEN), ("gemma2", SEVEN),
     ("gemma3_text", SEVEN), ("phi3", FUSED)],
)  # fmt: skip
def test_names_of_known_families(model_type, matrices):
    shapes = shapes_of(model_type, **TINY)
    roles = {name: role_of(name, shape) for name, shape in shapes.items()}
    assert not [name for name, shape in shapes.items() if by_structure(name, shape)]
    assert not [name for name, role in roles.items() if role.module == "other"]
    for layer in (0, 1):
        assert {role.module for role in roles.values() if role.layer == layer and role.is_matrix} == matrices
    assert {role.module for role in roles.values() if role.layer is None} <= {"embedding", "head", "norm"}
    two_dimensional = {name for name, shape in shapes.items() if len(shape) == 2}
    assert two_dimensional == {n for n, r in roles.items() if r.is_matrix or r.module in ("embedding", "head")}


OTHERS = {
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 16},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "stablelm": TINY,
    "olmo2": TINY,
    "cohere": TINY,
}  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_structure_of_other_decoders(model_type):
    shapes = shapes_of(model_type, **{**OTHERS[model_type], "vocab_size": 32, "pad_token_id": 0})
    roles = {name: role_of(name, shape) for name, shape in shapes.items()}
    positions = {name for name in shapes if "embed_positions" in name}
    assert {name for name, role in roles.items() if role.module == "other"} == positions
    for name, shape in shapes.items():
        inside = roles[name].layer is not None
        assert roles[name].is_matrix == (len(shape) == 2 and inside), name
        assert (roles[name].module in ("norm", "bias")) == (len(shape) == 1), name
    assert {role.layer for role in roles.values()} == {None, 0, 1}


def test_plan_tells_roles_by_structure(tmp_path):
    shapes = shapes_of("gpt_neox", vocab_size=32, **OTHERS["gpt_neox"])
    infos = {name: TensorInfo(shape, torch.float32, tmp_path) for name, shape in sorted(shapes.items())}
    told = notes(Checkpoint(tmp_path, {}, infos), {})
    assert len(told) == 1
    assert told[0].startswith(
        "9 tensors have roles by structure, not by a known name, first 'gpt_neox.embed_in.weight'"
    )


def test_towers_beside_the_decoder_have_no_role():
    assert role_of("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", (8, 8)).module == "other"
    assert role_of("multi_modal_projector.linear_1.weight", (8, 8)).module == "other"
