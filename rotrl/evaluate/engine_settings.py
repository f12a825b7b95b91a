"""The settings of an engine: which there are, which must agree for it to serve again, which GPUs each engine gets."""

import ast
import difflib
import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_type_hints

from rotrl.errors import ConfigError, EvaluationError
from rotrl.values import Count, Density, hint_of

GIVEN_HERE = ("model", "n", "disable_log_stats")  # not the user's to set
FREE = ("log", "max_model_len")  # may differ where an engine serves again


class Limits:
    """Our own settings, and those whose types in vLLM say too little."""

    threads: Count | None
    log: Path | None
    data_parallel_size: Count | None
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
    tensor_parallel_size: Count | None
    pipeline_parallel_size: Count | None
    max_num_seqs: Count | None
    max_num_batched_tokens: Count | None
    max_model_len: Count | None
    gpu_memory_utilization: Density | None


def check_settings(settings: Mapping[str, Any]) -> None:
    """ConfigError for a setting that vLLM does not have, EvaluationError where vLLM or GPUs are missing."""
    known = engine_hints()
    if unknown := [key for key in settings if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ConfigError(f"unknown key 'engine.{unknown[0]}'{hint} vLLM's LLM takes no such keyword")
    device_groups(settings)


def engine_hints() -> dict[str, Any]:
    """{setting: type hint}."""
    return vllm_settings() | get_type_hints(Limits, include_extras=True)


@cache
def vllm_settings() -> dict[str, Any]:
    """{keyword of vLLM's LLM: type hint}, read from its source: importing it takes seconds."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise EvaluationError("vLLM is not installed; install rotrl[cpu] or rotrl[gpu]")
    package, found = Path(spec.origin).parent, dict[str, Any]()
    for file, name in (("entrypoints/llm.py", "LLM"), ("engine/arg_utils.py", "EngineArgs")):
        tree = ast.parse((package / file).read_text())
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = hint_of(node.annotation)
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                found |= {argument.arg: hint_of(argument.annotation) for argument in node.args.kwonlyargs}
    return {name: hint for name, hint in found.items() if name not in GIVEN_HERE}


def must_agree(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for an engine to serve again."""
    return {key: value for key, value in settings.items() if key not in FREE and value is not None}


def device_groups(settings: Mapping[str, Any]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each engine; None where there are no GPUs to share out.

    `data_parallel_size` engines with tensor_parallel_size x pipeline_parallel_size GPUs each; null takes all GPUs.
    """
    wanted = settings.get("data_parallel_size", 1)
    width = (settings.get("tensor_parallel_size") or 1) * (settings.get("pipeline_parallel_size") or 1)
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
        raise ConfigError(f"engine.data_parallel_size: found {wanted!r}; give a number of engines, or null")
    if wanted == 1:
        return [None]
    visible = _visible_gpus()
    if not visible:
        return [None] * (wanted or 1)
    size = max(1, len(visible) // width) if wanted is None else wanted
    if size * width > len(visible):
        raise EvaluationError(
            f"engine.data_parallel_size={size} with {width} GPUs each needs {size * width}, but {len(visible)} are "
            "visible; set a smaller data_parallel_size or tensor_parallel_size"
        )
    return [",".join(visible[i * width : (i + 1) * width]) for i in range(size)]


def _visible_gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",")[:count] if listed and count else [str(i) for i in range(count)]
