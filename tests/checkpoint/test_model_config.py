"""Models of other functions are told apart by what their configurations say, and by nothing that is a default."""

import json

import pytest
import torch

from rotrl.checkpoint.family import open_family
from rotrl.checkpoint.model_config import config_differences
from rotrl.checkpoint.reader import check_family, open_checkpoint
from rotrl.checkpoint.sidecar import copy_sidecars
from rotrl.checkpoint.verify import verify
from rotrl.errors import CheckpointError
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge

GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "num_attention_heads": 8,
    "head_dim": 256,
    "sliding_window": 1024,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention"],
}
KINDS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
NEW = {**GEMMA, "rope_parameters": KINDS}
OLD = {**GEMMA, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4}


def nested(text):
    return {"model_type": "gemma3", "text_config": text}


def otherwise(kind, **changes):
    return {**NEW, "rope_parameters": {**KINDS, kind: {**KINDS[kind], **changes}}}


@pytest.mark.parametrize("place", [dict, nested])
@pytest.mark.parametrize(
    ("base", "expert", "told"),
    [
        (NEW, otherwise("full_attention", rope_theta=2e6), ["config rope {"]),
        (NEW, otherwise("full_attention", factor=4.0), ["config rope {"]),
        (NEW, otherwise("sliding_attention", rope_theta=2e4), ["config rope of sliding_attention {"]),
        (OLD, {**OLD, "rope_local_base_freq": 2e4}, ["config rope of sliding_attention {"]),
        (OLD, otherwise("sliding_attention", rope_theta=2e4), ["config rope of sliding_attention {"]),
        ({"rope_local_base_freq": 1e4}, {"rope_local_base_freq": 2e4}, ["config rope of sliding_attention {"]),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.25}, ["config rope {"]),
        (NEW, {**NEW, "num_attention_heads": 16}, ["config num_attention_heads=16, base has 8"]),
        (NEW, {**NEW, "sliding_window": 512}, ["config sliding_window=512, base has 1024"]),
        (NEW, {**NEW, "query_pre_attn_scalar": 168}, ["config query_pre_attn_scalar=168, base has 256"]),
        (NEW, {**NEW, "attn_logit_softcapping": 50.0}, ["config attn_logit_softcapping=50.0, base has None"]),
        (NEW, {**NEW, "final_logit_softcapping": 30.0}, ["config final_logit_softcapping=30.0, base has None"]),
        (NEW, {**NEW, "hidden_activation": "gelu"}, ["config hidden_activation='gelu', base has 'gelu_pytorch_tanh'"]),
        ({"sliding_window": 4096}, {"sliding_window": None}, ["config sliding_window=None, base has 4096"]),
    ],
)
def test_another_function(place, base, expert, told):
    found = config_differences(place(base), place(expert))
    assert [text[: len(start)] for text, start in zip(found, told, strict=True)] == told


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        (nested(OLD), nested(NEW)),
        # As published: what equals the class's defaults is left out.
        (nested({"hidden_size": 2560, "rope_scaling": OLD["rope_scaling"], "sliding_window": 1024}), nested(NEW)),
        ({"use_sliding_window": False, "sliding_window": 32768}, {"use_sliding_window": False, "sliding_window": None}),
        ({"use_sliding_window": False, "sliding_window": 4096}, {"use_sliding_window": False, "sliding_window": 8192}),
        ({"head_dim": None, "num_key_value_heads": 8}, {"head_dim": 128, "num_key_value_heads": 8}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}},
         {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}),
        ({"text_config": None, "rope_scaling": None}, {"text_config": [], "rope_scaling": "x"}),
    ],
)  # fmt: skip
def test_the_same_function_written_otherwise(base, expert):
    assert config_differences(base, expert) == []
    assert config_differences(expert, base) == []


def test_nested_models_are_compared(tensors, save):
    base = save("base", tensors(0), text_config={"num_attention_heads": 4})
    expert = save("expert", tensors(0), text_config={"num_attention_heads": 2})
    with pytest.raises(CheckpointError, match="config num_attention_heads=2, base has 4"):
        check_family(open_checkpoint(base), {"expert": open_checkpoint(expert)})


def test_rows_and_ties_are_written_where_nested_models_say_them(tensors, save, tmp_path):
    longer = {**tensors(1), "model.embed_tokens.weight": torch.randn(36, 16), "lm_head.weight": torch.randn(36, 16)}
    own = {"vocab_size": 36, "tie_word_embeddings": False}
    base = save("base", tensors(0), text_config={"vocab_size": 32, "tie_word_embeddings": True})
    expert = save("expert", longer, text_config=own, tie_word_embeddings=False)
    opened, experts = open_family(base, {"expert": expert}, vocab="pad", lm_head="untie")
    (tmp_path / "out").mkdir()
    copy_sidecars(opened, tmp_path / "out", torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == own
    assert written["tie_word_embeddings"] is False
    assert "vocab_size" not in written
    merge(opened, experts, bind({"_target_": "rotrl.merge.linear.linear"}, ["expert"]), tmp_path / "merged")
    verify(tmp_path / "merged")


def test_a_head_that_only_the_nested_configuration_ties(tensors, save):
    weights = tensors(0)
    folder = save("model", {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"tie_word_embeddings": True}}))
    assert "lm_head.weight" not in open_checkpoint(folder).tensors
