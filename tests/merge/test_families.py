"""Merges of tiny models of real architectures load again by transformers and answer."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.verify import verify
from rotrl.merge.engine import merge

TINY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2"), TINY),
    "gpt_neox": {**TINY, "num_key_value_heads": 4},
    "opt": {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 16, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_loads_again_and_answers(family, method, tmp_path):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    for name in ("math", "code"):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.01 * torch.randn_like(weight)
        model.save_pretrained(tmp_path / name)
    base, *tuned = (open_checkpoint(tmp_path / name) for name in ("base", "math", "code"))
    experts = dict(zip(("math", "code"), tuned, strict=True))
    ids = torch.arange(1, 9).reshape(1, 8)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(ids).logits
    for choice in ("linear", "tsv_m"):
        merge(base, experts, method(choice), tmp_path / choice)
        verify(tmp_path / choice)
        loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / choice, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        logits = loaded.eval()(ids).logits
        assert logits.isfinite().all()
        assert not torch.equal(logits, before)
