"""Adapters read as checkpoints against peft's own merge_and_unload; adapters of another base are refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from rotrl.checkpoint.adapter import open_adapter
from rotrl.checkpoint.family import notes, open_family
from rotrl.checkpoint.folder import on_disk
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.errors import CheckpointError

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
    "rslora by pattern": LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=r".*\.(q_proj|o_proj)",
        rank_pattern={"o_proj": 2},
        alpha_pattern={"q_proj": 3},
    ),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["k_proj", "up_proj"]),
    "embedding and trained norm": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"]),
    "one layer": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
    "oft": OFTConfig(oft_block_size=4, target_modules=LINEAR),
    "oft of exact cayley": OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=LINEAR),
    "oft with shared blocks": OFTConfig(oft_block_size=8, block_share=True, target_modules=["q_proj"]),
}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def train(base, tmp_path):
    """train(config) saves an adapter with random weights on the base; gives its folder and what peft merges."""

    def make(config):
        torch.manual_seed(1)
        model = get_peft_model(Qwen2ForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model.merge_and_unload().state_dict()

    return make


@pytest.mark.parametrize("kind", CONFIGS)
def test_tensors_are_those_that_peft_merges(kind, base, train):
    folder, merged = train(CONFIGS[kind])
    root = open_checkpoint(base)
    expert = open_adapter(folder, root)
    changed = 0
    for name, info in expert.tensors.items():
        tensor = expert.read(name)
        assert (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7)
        changed += not torch.equal(tensor, root.read(name))
    assert changed > 0


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_base_is_refused(base, train, tmp_path):
    folder, _ = train(CONFIGS["lora"])
    open_family(base, {"math": folder})
    edit(folder / "adapter_config.json", base_model_name_or_path="org/Other-7B")
    with pytest.raises(CheckpointError, match=r"math: .*adapter_config.json: .*trained on 'org/Other-7B', the base is"):
        open_family(base, {"math": folder})
    edit(folder / "adapter_config.json", base_model_name_or_path="elsewhere/base")
    open_family(base, {"math": folder})


def test_an_adapter_that_names_no_base_is_told_and_another_commit_refused(base, train, tmp_path):
    folder, _ = train(CONFIGS["lora"])
    root, experts = open_family(base, {"math": folder})
    assert not [told for told in notes(root, experts) if "adapter" in told]
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    root, experts = open_family(base, {"math": folder})
    assert notes(root, experts)[0] == (
        "math is an adapter that names no base: that it is base shows only in names and shapes"
    )
    snapshot = tmp_path / "models--org--base" / "snapshots" / ("a" * 40)
    shutil.copytree(base, snapshot)
    edit(folder / "adapter_config.json", base_model_name_or_path="org/base", revision="a" * 40)
    open_family(snapshot, {"math": folder})
    edit(folder / "adapter_config.json", revision="b" * 40)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: the adapter was trained on revision b{40}"):
        open_family(snapshot, {"math": folder})


def test_targets_that_the_base_lacks_or_shapes_otherwise_are_told_at_once(base, train, tensors, save):
    folder, _ = train(CONFIGS["lora"])
    weights = tensors(0)
    other = save("other", weights)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder, open_checkpoint(other))
    text = str(caught.value)
    assert "\n" not in text
    assert text.count("v_proj.lora_B.weight' has shape (8, 4), (4, 4) is expected") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"peft_type": "IA3"}, "peft_type is 'IA3', LORA or OFT"), ({"init_lora_weights": "pissa"}, "'pissa' changed"),
     ({"layer_replication": [[0, 2]]}, "layer_replication is not supported")],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(changes, words, base, train):
    folder, _ = train(CONFIGS["lora"])
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        open_adapter(folder, open_checkpoint(base))


def test_pickled_adapter_and_adapter_as_base(base, train):
    folder, _ = train(CONFIGS["lora"])
    with pytest.raises(CheckpointError, match=r"base: .*is a PEFT adapter; give the model"):
        open_family(folder, {"math": base})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: does not exist"):
        open_adapter(folder, open_checkpoint(base))


def test_folder_for_engines_is_the_merged_model_and_written_once(base, train, tmp_path):
    folder, merged = train(CONFIGS["oft"])
    root = open_checkpoint(base)
    expert = open_adapter(folder, root)
    assert on_disk(root, tmp_path / "cache") is root
    first = on_disk(expert, tmp_path / "cache")
    assert first.sha256 == expert.sha256
    written = (first.path / "model.safetensors").stat().st_mtime_ns
    assert on_disk(expert, tmp_path / "cache").path == first.path
    assert (first.given, first.path.parent) == (folder, tmp_path / "cache" / "models")  # a card names what was given
    assert (first.path / "model.safetensors").stat().st_mtime_ns == written
    loaded = Qwen2ForCausalLM.from_pretrained(first.path).state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-7)
    assert (first.path / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_small_update_on_a_half_precision_base_survives(base, train, tmp_path):
    folder, _ = train(CONFIGS["lora"])
    half = tmp_path / "half" / "base"
    Qwen2ForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    root = open_checkpoint(half)
    expert = open_adapter(folder, root)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert expert.read(name).dtype == torch.float32
    assert expert.read("model.layers.0.self_attn.k_proj.weight").dtype == torch.bfloat16
    assert not torch.equal(expert.read(name), expert.read(name).bfloat16().float())
