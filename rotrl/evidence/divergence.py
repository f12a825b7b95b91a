"""KL to an expert on its own samples, teacher-forced: exact over the vocabulary, a chunk of tokens at a time."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rotrl.align.data import Rollout, collate
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError

CHUNK = 1 << 26  # logits held at a time: 256 MB in float32


def load_model(checkpoint: Checkpoint) -> Any:
    """The transformers model of a checkpoint in float32, frozen."""
    from transformers import AutoModelForCausalLM

    from rotrl.align.trainer import quiet

    try:
        with quiet():  # a bar of its own would tear the run's
            model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: transformers can't load it ({error}); check config.json") from error
    model = cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().requires_grad_(False)


class Divergence:
    """KL(expert || model) of any model with the expert's vocabulary, summed by problem.

    The expert's last hidden states are kept; logits exist for CHUNK / vocabulary tokens at a time.
    """

    def __init__(self, expert: Checkpoint, rollouts: Sequence[Rollout], *, batch: int) -> None:
        ordered = sorted(rollouts, key=len)
        self.problems = sorted({rollout.problem for rollout in rollouts})
        place = {problem: i for i, problem in enumerate(self.problems)}
        self.batches = [collate(ordered[i : i + batch]) for i in range(0, len(ordered), batch)]
        self.owner = torch.cat(
            [torch.full((len(rollout.completion),), place[rollout.problem], dtype=torch.long) for rollout in ordered]
        )
        model = load_model(expert)
        self.head = model.get_output_embeddings().weight.clone()
        self.states = [_states(model, each) for each in self.batches]

    @property
    def tokens(self) -> NDArray[np.floating]:
        """Sampled tokens of every problem."""
        return torch.bincount(self.owner, minlength=len(self.problems)).double().numpy()

    def of(self, model: Any) -> NDArray[np.floating]:
        """Sum over the sampled tokens of each problem of KL(expert || model), in nats."""
        head = model.get_output_embeddings().weight
        found = [
            _kl(own, self.head, _states(model, each), head) for own, each in zip(self.states, self.batches, strict=True)
        ]
        return torch.bincount(self.owner, torch.cat(found), len(self.problems)).numpy()


def _states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(predicting positions, hidden): what the head turns into logits."""
    with torch.inference_mode():
        ids, predicts = (batch[key].to(model.device) for key in ("ids", "predicts"))
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[predicts]


def _kl(own: Tensor, own_head: Tensor, other: Tensor, head: Tensor) -> Tensor:
    rows = max(1, CHUNK // len(own_head))
    parts = []
    for p, q in zip(own.split(rows), other.split(rows), strict=True):
        log_p, log_q = ((h @ H.T).log_softmax(-1) for h, H in ((p, own_head), (q, head)))
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu())
    return torch.cat(parts)
