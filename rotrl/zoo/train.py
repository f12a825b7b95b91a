"""How a tiny model is trained: on a teacher's answers (base, SFT controls) and on rewards (RL experts), both with TRL.

Measured on one core: 0.1 s for a supervised step of 64 sequences, 0.7 s for a GRPO step of 24 prompts x 8 samples.
Wants the extra `zoo`; nothing but a rebuild of the checkpoints does.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, Qwen2ForCausalLM, Qwen2Tokenizer, TrainerCallback

from rotrl.zoo.model import MAX_TOKENS
from rotrl.zoo.reward import reward
from rotrl.zoo.tasks import Spec, Sum, problem, stream
from rotrl.zoo.teacher import Noise, text

Progress = Callable[[int, int, float], None]  # step, steps, loss or mean reward


def freeze_all_but_matrices(model: nn.Module) -> None:
    """Leave only the seven linear matrices of each layer trainable.

    Biases, norms and embeddings alone would carry most of the gain; "rotated matrices plus the expert's other
    parameters" would then look like proof of a rotation.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_proj.weight"))


def training_items(families: list[str], count: int, seed: str) -> list[tuple[str, Sum | Spec]]:
    """`count` items with their families, in equal shares; drill is made of math problems."""
    rng = random.Random(seed)
    streams = [(f, stream("math" if f == "drill" else f, "train", rng)) for f in families]
    return [(f, next(s)) for f, s in (streams[i % len(streams)] for i in range(count))]


def supervised(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    state: Path,
    *,
    families: list[str],
    noise: dict[str, float] | None = None,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    save_every: int,
    progress: Progress | None = None,
) -> list[float]:
    """Cross entropy on the answers of a teacher (without `noise` a perfect one); returns the loss of each step."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rng = random.Random(f"{seed}/noise")
    habits = Noise(**noise) if noise else Noise(0, 0, 0, 0)
    items = training_items(families, steps * batch, f"{seed}/items")
    texts = [text(family, item, habits, rng) for family, item in items]
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    settings = SFTConfig(
        **common(state, steps, rate, seed, save_every),
        per_device_train_batch_size=batch,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
    )
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    return run(trainer, "loss", state, progress)


def grpo(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    state: Path,
    *,
    families: list[str],
    steps: int,
    prompts: int,
    samples: int,
    rate: float,
    seed: int,
    save_every: int,
    progress: Progress | None = None,
) -> list[float]:
    """On-policy GRPO (arXiv 2402.03300) with advantages divided by their deviation and no KL term.

    Returns the mean reward of each step.
    """
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    problems = {i.prompt: problem(i) for _, i in training_items(families, steps * prompts, f"{seed}/items")}

    def rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [reward(problems[p], c) for p, c in zip(prompts, completions, strict=True)]

    settings = GRPOConfig(
        **common(state, steps, rate, seed, save_every),
        per_device_train_batch_size=prompts * samples,
        num_generations=samples,
        max_completion_length=MAX_TOKENS,
        lr_scheduler_type="linear",
        beta=0.0,
        temperature=1.0,
        top_k=0,
    )
    data = Dataset.from_list([{"prompt": p} for p in problems])
    trainer = GRPOTrainer(model, rewards, args=settings, train_dataset=data, processing_class=tokenizer)
    return run(trainer, "reward", state, progress)


def common(state: Path, steps: int, rate: float, seed: int, save_every: int) -> dict[str, Any]:
    return {
        "output_dir": str(state),
        "max_steps": steps,
        "learning_rate": rate,
        "adam_beta2": 0.95,
        "seed": seed,
        "save_steps": save_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


class Show(TrainerCallback):
    def __init__(self, key: str, progress: Progress) -> None:
        self.key, self.progress = key, progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and self.key in logs:
            self.progress(state.global_step, state.max_steps, float(logs[self.key]))


def run(trainer: Any, key: str, state: Path, progress: Progress | None) -> list[float]:
    """Train, from the newest whole checkpoint in `state` if there is one; the state file is what is written last."""
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.add_callback(Show(key, progress))
    whole = [p.parent for p in state.glob("checkpoint-*/trainer_state.json") if p.stat().st_size]
    newest = max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    return [round(float(entry[key]), 4) for entry in trainer.state.log_history if key in entry]
