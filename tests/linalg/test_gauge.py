"""Gauges leave the logits of a random Qwen2 alone to 1e-12 in float64, and the two that are none do not."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rotrl.linalg.gauge import (
    fold_norms,
    head_rotation,
    nearest_gauge,
    neurons,
    query_key_rotation,
    residual_rotation,
    rope_rotation,
)

HEADS, GROUPS, WIDTH, HIDDEN, MIDDLE, LAYERS = 4, 2, 8, 24, 40, 2
IDS = torch.arange(14).reshape(2, 7) % 11


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d, seed=1):
    return torch.linalg.qr(random(d, d, seed=seed)).Q


def exact_norm(norm):
    """RMSNorm in the dtype of its input: that of transformers rounds to float32, which a gauge can't undo."""

    def forward(x):
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    return forward


def build(state=None, tied=True):
    config = Qwen2Config(
        vocab_size=11,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=WIDTH,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).double().eval()
    for module in model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":
            module.forward = exact_norm(module)
    if state is not None:
        model.load_state_dict(state, strict=not tied)
    return model


@pytest.fixture(scope="module")
def state():
    """Every tensor random, gains and biases too; a tied head, so without one of its own."""
    model = build()
    drawn = {name: 0.3 * random(*W.shape, seed=i) for i, (name, W) in enumerate(sorted(model.state_dict().items()))}
    del drawn["lm_head.weight"]
    return drawn


def logits(state):
    with torch.no_grad():
        return build(state, tied="lm_head.weight" not in state)(IDS).logits


def change(state, moved):
    assert moved.keys() >= state.keys()
    assert all(moved[name].dtype == W.dtype for name, W in state.items())
    assert any(not torch.allclose(moved[name], W) for name, W in state.items())
    before = logits(state)
    return float((logits(moved) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("layer", range(LAYERS))
def test_values_turn_with_the_columns_of_o(state, layer, group):
    assert change(state, head_rotation(state, layer, group, orthogonal(WIDTH))) < 1e-12


@pytest.mark.parametrize("group", range(GROUPS))
def test_queries_and_keys_turn_in_the_planes_of_rope(state, group):
    assert change(state, rope_rotation(state, 1, group, 3 * random(WIDTH // 2))) < 1e-12


def test_a_full_rotation_of_queries_and_keys_is_no_gauge_under_rope(state):
    assert change(state, query_key_rotation(state, 0, 0, orthogonal(WIDTH))) > 1e-4


def test_a_rotation_without_the_bias_is_no_gauge(state):
    moved = head_rotation(state, 0, 0, orthogonal(WIDTH))
    bias = "model.layers.0.self_attn.v_proj.bias"
    assert change(state, moved | {bias: state[bias]}) > 1e-4


def test_the_residual_stream_turns_once_the_gains_are_folded(state):
    folded = fold_norms(state)
    assert change(state, folded) < 1e-12
    assert all((W == 1).all() for name, W in folded.items() if "norm" in name)
    assert change(state, residual_rotation(folded, orthogonal(HIDDEN))) < 1e-12


def test_the_residual_stream_does_not_turn_without_folding(state):
    assert change(state, residual_rotation(state, orthogonal(HIDDEN))) > 1e-3


def test_neurons_permute_and_scale(state):
    order = torch.randperm(MIDDLE, generator=torch.Generator().manual_seed(0))
    scale = random(MIDDLE, seed=2)
    assert change(state, neurons(state, 1, order, scale)) < 1e-12


def test_all_gauges_together(state):
    moved = fold_norms(state)
    for layer in range(LAYERS):
        for group in range(GROUPS):
            moved = head_rotation(moved, layer, group, orthogonal(WIDTH, seed=5 + group))
            moved = rope_rotation(moved, layer, group, random(WIDTH // 2, seed=layer))
        moved = neurons(moved, layer, torch.arange(MIDDLE).flip(0), random(MIDDLE, seed=3) + 3)
    moved = residual_rotation(moved, orthogonal(HIDDEN, seed=9))
    assert change(state, moved) < 1e-12


def disguised(state):
    """Another gauge of the same model: values, RoPE planes and neurons of every layer."""
    moved = dict(state)
    for layer in range(LAYERS):
        for group in range(GROUPS):
            moved = head_rotation(moved, layer, group, orthogonal(WIDTH, seed=5 + group + layer))
            moved = rope_rotation(moved, layer, group, 3 * random(WIDTH // 2, seed=group))
        order = torch.randperm(MIDDLE, generator=torch.Generator().manual_seed(layer))
        moved = neurons(moved, layer, order, random(MIDDLE, seed=3))
    return moved


def nearest(state, target):
    for layer in range(LAYERS):
        state = nearest_gauge(state, target, layer, WIDTH)
    return state


def test_the_nearest_gauge_undoes_another(state):
    found = nearest(disguised(state), state)
    for name, W in state.items():
        torch.testing.assert_close(found[name], W, rtol=1e-9, atol=1e-9)


def test_the_nearest_gauge_of_a_disguised_expert_is_the_expert_s_and_computes_the_same(state):
    expert = {name: W + 0.01 * random(*W.shape, seed=50 + i) for i, (name, W) in enumerate(sorted(state.items()))}
    hidden = disguised(expert)
    found, own = nearest(hidden, state), nearest(expert, state)

    def distance(other):
        return sum(float((other[name] - W).square().sum()) for name, W in state.items())

    assert change(hidden, found) < 1e-12
    for name, W in own.items():  # whatever gauge an expert comes in, one is found
        torch.testing.assert_close(found[name], W, rtol=1e-6, atol=1e-6)
    assert distance(own) < 1.01 * distance(expert) < 1e-3 * distance(hidden)


def test_a_head_that_does_not_fit_is_refused(state):
    with pytest.raises(ValueError, match=r"32 and 16 rows of q and k are no multiples of 5 \(head_dim\)"):
        head_rotation(state, 0, 0, orthogonal(5))
