"""Gram matrices against inputs that are worked out by hand from the hidden states, one sequence at a time."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rotrl.align.data import read_rollouts
from rotrl.align.gram import gather
from rotrl.checkpoint.grams import open_grams, planned_sizes
from rotrl.errors import CheckpointError, ConfigError

CPU = {"accelerator": "cpu"}


def inputs_by_hand(model, ids):
    """The inputs of the maps of every layer for one sequence, from hidden states and the output of attention."""
    attended = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *at, number=number: attended.update({number: at[2][0]}))
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    found = {}
    for number, layer in enumerate(model.model.layers):
        middle = layer.post_attention_layernorm(states[number] + attended[number])
        mlp = layer.mlp
        found |= {
            f"{number}.self_attn.q": layer.input_layernorm(states[number]),
            # the output matrix is square here: what it gave tells what it was given
            f"{number}.self_attn.o": attended[number] @ torch.linalg.inv(layer.self_attn.o_proj.weight).T,
            f"{number}.mlp.gate": middle,
            f"{number}.mlp.down": torch.nn.functional.silu(middle @ mlp.gate_proj.weight.T)
            * (middle @ mlp.up_proj.weight.T),
        }
    return {f"model.layers.{name}_proj.weight": x[0] for name, x in found.items()}


@pytest.mark.parametrize(("layers", "batch"), [(None, 16), (1, 3)])
@torch.no_grad()
def test_gram_matrices_are_those_of_the_inputs(pair, tmp_path, layers, batch):
    _, experts, rollouts = pair
    steps = []
    gather(
        experts["math"], rollouts["math"], tmp_path / "out", trainer=CPU, layers=layers, batch=batch,
        progress=lambda *at: steps.append(at),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(experts["math"].path, dtype=torch.float64)
    sums, tokens = {}, 0
    for rollout in read_rollouts(rollouts["math"]):
        ids = torch.tensor([rollout.prompt + rollout.completion])
        tokens += ids.numel()
        for name, x in inputs_by_hand(model, ids).items():
            sums[name] = sums.get(name, 0) + x.T @ x
    grams = open_grams(tmp_path / "out")
    assert grams.tokens == tokens
    assert set(grams.files.tensors) == set(sums)
    for name, total in sums.items():
        torch.testing.assert_close(grams.get(name), (total / tokens).float(), rtol=1e-4, atol=1e-4)
    for layer in (0, 1):
        for shared, owner in (("self_attn.k", "self_attn.q"), ("self_attn.v", "self_attn.q"), ("mlp.up", "mlp.gate")):
            assert grams.entries[f"model.layers.{layer}.{shared}_proj.weight"] == (
                f"model.layers.{layer}.{owner}_proj.weight"
            )
    assert len(grams.entries) == 14
    assert grams.get("model.embed_tokens.weight") is None
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    assert planned_sizes(experts["math"]) == dict.fromkeys((0, 1), 4 * (3 * 16**2 + 32**2))


def test_samples_are_cut_and_a_finished_folder_is_left_alone(pair, tmp_path):
    _, experts, rollouts = pair
    gather(experts["math"], rollouts["math"], tmp_path / "out", trainer=CPU, max_tokens=6)
    assert open_grams(tmp_path / "out").tokens == sum(map(len, read_rollouts(rollouts["math"], max_tokens=6)))
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    gather(experts["math"], rollouts["math"], tmp_path / "out", trainer=CPU)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_without_linear_maps_is_refused(tmp_path, pair):
    from transformers import GPT2Config, GPT2LMHeadModel

    from rotrl.checkpoint.reader import open_checkpoint

    config = GPT2Config(vocab_size=23, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="gpt2: none of its matrices is a Linear of GPT2LMHeadModel"):
        gather(open_checkpoint(tmp_path / "gpt2"), pair[2]["math"], tmp_path / "out", trainer=CPU)
    assert not (tmp_path / "out").exists()


def test_broken_samples_are_named(pair, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt_ids": [1]}))
    with pytest.raises(ConfigError, match=r"r\.jsonl: line 1 is no rollout"):
        gather(pair[1]["math"], tmp_path / "r.jsonl", tmp_path / "out", trainer=CPU)
