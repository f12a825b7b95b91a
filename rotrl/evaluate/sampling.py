"""What goes into an engine and what comes out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from rotrl.errors import ConfigError
from rotrl.values import Count, Density, NonNegative, Positive, Share, Within

Penalty = Annotated[float, Within(-2, 2)]


@dataclass(frozen=True)
class Request:
    key: Any
    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """`finish_reason`: stop, length, or failed (vLLM refused the prompt or died of it; `text` may say why)."""

    key: Any
    text: str
    token_ids: Sequence[int]
    finish_reason: str


@dataclass(frozen=True)
class Sampling:
    """Every parameter that shapes a sample, so that no default of an engine or of a model's folder does.

    `top_k` 0 or -1 and `top_p` 1 take all tokens, `temperature` 0 takes the likeliest.
    """

    temperature: NonNegative
    top_p: Density
    top_k: Annotated[int, Within(-1)]
    max_tokens: Count
    min_p: Share = 0.0
    min_tokens: Annotated[int, Within(0)] = 0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Positive = 1.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @classmethod
    def of(cls, protocol: Mapping[str, Any]) -> "Sampling":
        """The sampling part of a protocol. ConfigError names what is missing."""
        names = [field.name for field in fields(cls)]
        given: dict[str, Any] = {name: protocol[name] for name in names if protocol.get(name) is not None}
        missing = [key for key in ("temperature", "top_p", "top_k", "max_tokens") if key not in given]
        if missing:
            raise ConfigError(f"protocol: {', '.join(missing)} missing; a protocol fixes every sampling parameter")
        given["stop"] = tuple(given.get("stop", ()))
        return cls(**given)

    def parameters(self) -> dict[str, Any]:
        """Keywords of vLLM's SamplingParams. Text is decoded outside, unless a stop text has to be found in it."""
        return {**asdict(self), "stop": list(self.stop), "detokenize": bool(self.stop), "n": 1}


def samples_per_problem(protocol: Mapping[str, Any], task: str) -> int:
    """`n` of a protocol for a task: one number, or a map by task with `default` for those it does not name."""
    n = protocol.get("n")
    found = n.get(task, n.get("default")) if isinstance(n, Mapping) else n
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ConfigError(f"protocol.n: found {found!r} for task {task}; give a number of samples, at least 1")
    return found


def sample_seed(run_seed: int, problem_id: str, sample_index: int) -> int:
    """The seed of one sample: n can grow, and any sample can be made again alone. The same for all models, whose
    comparison is the sharper for it."""
    digest = hashlib.sha256(f"{run_seed}/{sample_index}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
