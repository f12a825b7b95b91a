"""Settings of every test, and checkpoints made in the test run: Qwen2 names, hidden 16, two layers."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor

# A shared machine makes hypothesis' time limits flaky, so it has none.
settings.register_profile("rotrl", deadline=None, max_examples=50)
settings.load_profile("rotrl")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored by what they start in the background
torch.set_num_threads(1)  # matrices here are small: threads would only wait for each other

SHAPES = {
    "self_attn.q_proj.weight": (16, 16),
    "self_attn.q_proj.bias": (16,),
    "self_attn.k_proj.weight": (4, 16),
    "self_attn.v_proj.weight": (4, 16),
    "self_attn.o_proj.weight": (16, 16),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
    "input_layernorm.weight": (16,),
}


@pytest.fixture
def tensors() -> Callable[..., dict[str, Tensor]]:
    """tensors(seed) are a base's; tensors(seed, base=b, size=s) those of an expert with |d| = s |W0| per tensor."""

    def make(seed: int, *, base: dict[str, Tensor] | None = None, size: float = 0.05) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,)}
        for layer in range(2):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
        noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if base is None:
            return noise
        return {name: base[name] + size * base[name].norm() / d.norm() * d for name, d in noise.items()}

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(name, tensors, shards=1, dtype=float32, **config) writes a checkpoint folder and gives its path."""

    def write(
        name: str, tensors: dict[str, Tensor], *, shards: int = 1, dtype: torch.dtype = torch.float32, **config: object
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        content = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 2, "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps({**content, "dtype": "float32", **config}))
        vocabulary = {chr(97 + i): i for i in range(26)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
        stored = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
        if shards == 1:
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        names = sorted(stored)
        files = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(names)}
        for file in set(files.values()):
            save_file({key: stored[key] for key in names if files[key] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return folder

    return write


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """typed("merge=ties", ...) is (exit code, stderr) of `python -m rotrl merge=ties ...`, in this process."""
    from rotrl import __main__ as program

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(program, "FAILURE", [])
        monkeypatch.setattr(sys, "argv", ["rotrl", *map(str, arguments)])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                program.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return int(str(ended.value.code)), capfd.readouterr().err

    return run
