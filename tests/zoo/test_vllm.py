"""The packaged tokenizer and weights through vLLM itself."""

import multiprocessing
import os
from typing import Any

import pytest
from transformers import AutoTokenizer

from rotrl.zoo import zoo_path
from rotrl.zoo.model import CHARACTERS, MAX_TOKENS, PIECES
from rotrl.zoo.reward import reward
from rotrl.zoo.tasks import code_task


def through_vllm(folder, prompts, symbols):
    """In a process of its own: decoded symbols, and (text, token ids) of one greedy answer a prompt."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True)
    tokenizer = llm.get_tokenizer()
    back = [tokenizer.decode(tokenizer.encode(s)) for s in symbols]
    talks: Any = [[{"role": "user", "content": p}] for p in prompts]
    outputs = llm.chat(talks, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    return back, [(list(o.prompt_token_ids or ()), o.outputs[0].text, list(o.outputs[0].token_ids)) for o in outputs]


@pytest.mark.slow
def test_symbols_and_answers_survive():
    task, folder, symbols = code_task(limit=40), str(zoo_path("code")), [*CHARACTERS, *PIECES]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        back, answers = pool.apply(through_vllm, (folder, [p.prompt for p in task.problems], symbols))
    assert back == symbols
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for problem, (prompt_ids, text, ids) in zip(task.problems, answers, strict=True):
        assert prompt_ids == tokenizer.encode(problem.prompt)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert ids[-1] == tokenizer.eos_token_id
    assert sum(reward(p, a[1]) for p, a in zip(task.problems, answers, strict=True)) >= 36
