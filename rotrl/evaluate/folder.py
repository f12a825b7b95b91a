"""What an engine must know of a model's folder without reading its weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError

IGNORED = ("transformers_version", "dtype", "torch_dtype", "use_cache")


def context_length(model_dir: Path) -> int:
    """The most positions that a model has, from its config.json."""
    config = _config(model_dir)
    if "max_position_embeddings" not in config:
        raise EvaluationError(f"{model_dir}/config.json: max_position_embeddings is missing; add the model's context")
    return int(config["max_position_embeddings"])


def hidden_size(model_dir: Path) -> int:
    return int(_config(model_dir).get("hidden_size", 0))


def architecture(model_dir: Path) -> dict[str, Any]:
    """What must agree for the weights of one model to stand in an engine that was started with another: the
    configuration with its defaults filled in, so that two versions of transformers write the same."""
    return _filled(Path(model_dir), json.dumps(_config(model_dir)))


@cache
def _filled(model_dir: Path, text: str) -> dict[str, Any]:
    config = json.loads(text)
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True).to_dict()
    except ValueError:  # a type that transformers does not know: compared as it is written
        pass
    return {key: value for key, value in config.items() if key not in IGNORED and not key.startswith("_")}


def _config(model_dir: Path) -> dict[str, Any]:
    file = Path(model_dir) / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file}: can't be read ({error}); vLLM needs the model's configuration") from None


def signature(model_dir: Path) -> list[tuple]:
    """What changes when other weights are written to the same folder."""
    stats = [(file, file.stat()) for file in sorted(Path(model_dir).resolve().glob("*.safetensors"))]
    return [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats]
