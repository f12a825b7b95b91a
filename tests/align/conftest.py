import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rotrl.checkpoint.reader import Checkpoint, open_checkpoint

VOCABULARY, SAMPLES = 23, 4
TRAINER = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}


def make_model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config)


def save_rollouts(model: Qwen2ForCausalLM, path: Path, problems: int, seed: int) -> Path:
    """Samples at temperature 1, prompts and completions of changing length."""
    torch.manual_seed(seed)
    lines = []
    for problem in range(problems):
        prompt = torch.randint(VOCABULARY, (1, 3 + problem % 3)).expand(SAMPLES, -1)
        mask, length = torch.ones_like(prompt), 4 + problem % 5
        ids = model.generate(prompt, attention_mask=mask, do_sample=True, max_new_tokens=length, pad_token_id=0)
        for index, row in enumerate(ids.tolist()):
            tokens = {"prompt_ids": row[: prompt.shape[1]], "completion_ids": row[prompt.shape[1] :]}
            lines.append(json.dumps({**tokens, "problem_id": f"p{problem}", "sample_index": index}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, Path]]:
    """A random base, two experts whose linear maps lie near it, and samples of both."""
    folder = tmp_path_factory.mktemp("pair")
    make_model(0).save_pretrained(folder / "base")
    experts, rollouts = {}, {}
    for seed, name in enumerate(("math", "code"), 1):
        model = make_model(0)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith("proj.weight"):
                    weight += 0.1 * weight.std() * torch.randn_like(weight)
        model.save_pretrained(folder / name)
        experts[name] = open_checkpoint(folder / name)
        rollouts[name] = save_rollouts(model, folder / f"{name}.jsonl", 24, seed)
    return open_checkpoint(folder / "base"), experts, rollouts


@pytest.fixture
def call(pair) -> Callable[..., dict]:
    """`call(stiefel, out, **hyper)` on the pair, from the base unless told otherwise."""
    base, experts, rollouts = pair

    def run(function: Callable[..., dict], out: Path, **changes) -> dict:
        given = {"rollouts": rollouts, "trainer": TRAINER, "seed": 0, "source": "base"}
        return function(base, experts, out, **{**given, **changes})

    return run
