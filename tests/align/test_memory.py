"""The plan's memory against what torch holds: the same bytes on fake tensors as on real ones."""

import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from rotrl.align.memory import KINDS, activations, kept_bytes, plan_memory
from rotrl.checkpoint.reader import Checkpoint, open_checkpoint
from rotrl.config import compose
from rotrl.errors import ConfigError
from rotrl.zoo import zoo_path

CPU = {"precision": "32-true"}


def plain(*overrides: str) -> dict:
    return OmegaConf.to_container(compose(list(overrides)), resolve=True)  # type: ignore[return-value]


def settings(*overrides: str) -> dict:
    return plain(*overrides)["align"] | {"max_tokens": 24, "batch": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_keeps(dtype: torch.dtype):
    """Of the tiny pair, whose number of layers is not that of the count; masks are a few numbers a token."""
    model = AutoModelForCausalLM.from_pretrained(zoo_path("base"), dtype=dtype).eval().requires_grad_(False)
    real = kept_bytes(model, torch.zeros(3, 24, dtype=torch.long))
    planned = activations(AutoConfig.from_pretrained(zoo_path("base")), (3, 24), dtype, recompute=False)
    assert planned == pytest.approx(real, rel=0.03)
    again = activations(AutoConfig.from_pretrained(zoo_path("base")), (3, 24), dtype, recompute=True)
    assert again < real / 2


@pytest.mark.parametrize("name", [*KINDS, "coefficients", "split"])
def test_parameters_are_those_of_the_fit(name: str):
    base = open_checkpoint(zoo_path("base"))
    own = settings(f"align={name}")
    planned = plan_memory(base, ["math"], ["math", "code"], own, CPU)
    size = sum(math.prod(info.shape) for info in base.tensors.values()) * 4
    assert planned["frozen models"] == 2 * size
    matrices = [(info.shape[0], info.shape[1]) for key, info in base.tensors.items() if key.endswith("proj.weight")]
    expected = {
        "stiefel": sum(min(shape) ** 2 for shape in matrices),
        "cayley": sum(min(shape) ** 2 for shape in matrices),
        "low_rank": sum(8 * min(shape) for shape in matrices),
        "lora": sum(4 * sum(shape) for shape in matrices),
        "free": sum(m * n for m, n in matrices),
        "coefficients": 2 * len(matrices),
        "split": 2 * len(matrices),
    }
    assert planned["parameters, gradients, moments"] == 16 * expected[name]


@pytest.fixture
def real_size(tmp_path: Path) -> Checkpoint:
    """The header of a 1.5B checkpoint: sizes as they are, a file with holes."""
    shape = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": False}
    made = AutoConfig.for_model("qwen2", **shape)
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(made).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(8 + len(told) + end)
    return open_checkpoint(tmp_path)


def test_the_real_experiment_fits_a_gpu_of_80_gb(real_size: Checkpoint):
    cfg = plain("+experiment=align_deepscaler_deepcoder")
    own = cfg["align"]
    assert (own["steps"], own["batch"], own["max_tokens"]) == (200, 8, 2048)
    planned = plan_memory(real_size, own["teachers"], ["math", "code"], own, cfg["trainer"])
    assert 25e9 < sum(planned.values()) < 50e9
    without = plan_memory(real_size, ["code"], [], own | {"gradient_checkpointing": False}, cfg["trainer"])
    assert sum(without.values()) - sum(planned.values()) > 40e9
    both = plan_memory(real_size, ["math", "code"], [], own, cfg["trainer"])
    assert both["activations"] == 2 * planned["activations"]
    assert sum(both.values()) < 80e9
    squares = plan_memory(real_size, ["code"], [], own | {"objective": "activation"}, cfg["trainer"])
    assert squares["Gram matrices"] > 9e9
    with pytest.raises(ConfigError, match="would be rotated by a dense matrix in 8960 dimensions"):
        plan_memory(real_size, ["code"], [], own | {"side": "left"}, cfg["trainer"])
