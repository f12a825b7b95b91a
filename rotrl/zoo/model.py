"""Tokenizer and architecture of the tiny pair: 41 tokens, Qwen2 with 300k parameters.

The chat template renders the contents of the messages and nothing else: a prompt ends in `=` or `:`, which already
says that the answer follows, so neither role tokens nor a BOS are spent. An answer ends with `<|im_end|>`.
"""

from typing import Any

import torch
from transformers import AddedToken, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD, END = "<|endoftext|>", "<|im_end|>"
CHARACTERS = "0123456789+-*=(),;}:x "
PIECES = (
    *("math:", "code:", " then ", "\\boxed{", "lambda x:"),
    *("add ", "subtract ", "times ", "double", "triple", "square", "negate", "abs", "max with ", "min with "),
    *("max", "min"),
)
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + END + "{% endif %}{% endfor %}"
)
CONTEXT = 256
MAX_TOKENS = 40  # the longest right answer has 33


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level Qwen2 tokenizer without merges.

    For `model_type=qwen2` AutoTokenizer replaces a word-level tokenizer by this class and silently drops characters;
    bytes as vocabulary and whole words as added tokens survive that.
    """
    byte = {" ": "Ġ"}
    vocab = {byte.get(c, c): i for i, c in enumerate(CHARACTERS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token=PAD, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in PIECES])
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Random weights, float32."""
    torch.manual_seed(seed)
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype="float32",
        **ends,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ends)
    return model
