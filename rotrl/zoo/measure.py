"""Accuracy at temperature 1 with batched sampling: what the manifest records, and a check on the engine's numbers."""

import math
from statistics import mean, stdev

import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from rotrl.evaluate.task import Problem, Task
from rotrl.zoo.model import MAX_TOKENS
from rotrl.zoo.reward import reward


@torch.no_grad()
def complete(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, prompts: list[str], seed: int) -> list[str]:
    """One sampled answer a prompt."""
    torch.manual_seed(seed)
    left = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    ids = generate(**left, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_TOKENS)
    return tokenizer.batch_decode(ids[:, left["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, task: Task, *, samples: int = 8, seed: int = 0
) -> dict[str, float]:
    """avg@samples with its standard error over problems, and pass@samples."""
    asked: list[Problem] = [p for p in task.problems for _ in range(samples)]
    texts = complete(model, tokenizer, [p.prompt for p in asked], seed)
    rewards = [reward(p, t) for p, t in zip(asked, texts, strict=True)]
    groups = [rewards[i : i + samples] for i in range(0, len(rewards), samples)]
    means = [mean(g) for g in groups]
    return {
        "accuracy": round(mean(means), 4),
        "standard_error": round(stdev(means) / math.sqrt(len(means)), 4),
        f"pass@{samples}": round(mean(map(max, groups)), 4),
    }
