"""The tokenizer survives what transformers and vLLM make of a saved Qwen2 folder."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotrl.zoo.model import CHARACTERS, END, MAX_TOKENS, PIECES, make_model, make_tokenizer
from rotrl.zoo.tasks import items


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    make_model(tokenizer, 0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


TEXTS = [t for f in ("math", "code") for i in items(f, "train", 40, 0) for t in (i.prompt + i.solution,)]


@pytest.mark.parametrize("symbol", [*CHARACTERS, *PIECES, END])
def test_every_symbol_is_one_token_and_comes_back(tokenizer, symbol):
    ids = tokenizer.encode(symbol)
    assert len(ids) == 1
    assert tokenizer.decode(ids) == symbol
    assert tokenizer.decode(ids, skip_special_tokens=True) == ("" if symbol == END else symbol)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_prompt_tokens_are_a_prefix(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode([i]) for i in ids) == text
    prompt = text[: text.index("=") + 1] if text.startswith("math") else text[: text.index(":lambda") + 1]
    assert ids[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)


def test_chat_template_adds_nothing(tokenizer):
    prompt = "math:(3+4)*2-5="
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    assert rendered == tokenizer.encode(prompt)
    talk = [{"role": "user", "content": "math:3+4="}, {"role": "assistant", "content": "\\boxed{7}"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "math:3+4=\\boxed{7}" + END


def test_answers_fit_the_token_limit(tokenizer):
    longest = max(len(tokenizer.encode(i.solution + END)) for f in ("math", "code") for i in items(f, "train", 2000, 1))
    assert longest <= MAX_TOKENS


def test_model_folder(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 300_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
