"""Parameters by depth, module and pattern."""

import pytest
import torch

from rotrl.checkpoint.layout import Role, role_of
from rotrl.errors import ConfigError
from rotrl.merge.check import value_at
from rotrl.merge.engine import merge_state

NAME = "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("depth", "value"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0), (None, 7.0)]
)
def test_list_over_depth(depth, value):
    assert value_at([0.0, 1.0, 0.0], 7.0, NAME, Role(3, "q"), depth) == pytest.approx(value)
    assert value_at([0.3], 7.0, NAME, Role(3, "q"), 0.4) == pytest.approx(0.3)


def test_first_match_holds():
    values = {r"layers\.3\.self": 0.1, "q": 0.2, "norm": 0.3}
    assert value_at(values, 1.0, NAME, Role(3, "q"), 0.5) == 0.1
    assert value_at(values, 1.0, "model.layers.4.self_attn.q_proj.weight", Role(4, "q"), 0.5) == 0.2
    assert value_at(values, 1.0, "model.layers.4.mlp.up_proj.weight", Role(4, "up"), 0.5) == 1.0
    # a module's name is no pattern: `norm` is not what q_norm.weight's name contains
    assert value_at({"norm": 0.3}, 1.0, "model.norm.proj", Role(None, "other"), None) == 1.0


def test_merge_by_depth_and_by_module(trio, method):
    base, experts = trio
    arithmetic = method("task_arithmetic", per_layer={"scale": [0.0, 1.0]})
    by_module = method(
        "tsv_m", scale=0.0, per_layer={"scale": {"norm": 0.5, "layers.1.self_attn.o_proj": "mean", "q": 1.0}}
    )
    for name, merged in merge_state(*trio, arithmetic).items():
        w0, ws = base.read(name), [e.read(name) for e in experts.values()]
        scale = {None: 1.0, 0: 0.0, 1: 1.0}[role_of(name, w0.shape).layer]
        torch.testing.assert_close(merged, w0 + scale * (sum(ws) - 2 * w0))
    for name, merged in merge_state(*trio, by_module).items():
        w0, ws = base.read(name), [e.read(name) for e in experts.values()]
        module = role_of(name, w0.shape).module
        if module == "norm":
            torch.testing.assert_close(merged, w0 + 0.5 * (sum(ws) - 2 * w0))
        else:
            assert torch.equal(merged, w0) == (module != "q" and "layers.1.self_attn.o_proj" not in name)


def test_weights_by_module(trio, method):
    experts = trio[1]
    linear = method("linear", per_layer={"weights": {"q": {"math": 1.0, "code": 0.0}}})
    state = merge_state(*trio, linear)
    torch.testing.assert_close(
        state["model.layers.1.self_attn.q_proj.weight"], experts["math"].read("model.layers.1.self_attn.q_proj.weight")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(state[name], sum(e.read(name) for e in experts.values()) / 2)


@pytest.mark.parametrize(
    ("per_layer", "words"),
    [
        ([1.0], "merge.per_layer is [1.0], a map from parameter"),
        (
            {"denisty": [0.1]},
            "unknown parameter merge.per_layer.denisty of the method, did you mean 'density'? (it takes density, ",
        ),
        ({"density": 0.3}, "merge.per_layer.density is 0.3, a list over depth or a map"),
        ({"density": [0.3, 3.0]}, "merge.per_layer.density.1 is 3.0, it must lie in (0, 1]"),
        ({"density": []}, "merge.per_layer.density is []"),
        ({"density": {"q": -1}}, "merge.per_layer.density.q is -1, it must lie in (0, 1]"),
        ({"density": {"(": 0.1}}, "'(' is neither a module (q, k, "),
        ({"normalize": [1, 0]}, "only numbers are interpolated"),
        ({"scale": ["mean", 1.0]}, "rules can't be interpolated"),
        ({"scale": {"q": "large"}}, "merge.per_layer.scale.q is 'large', a number or one of mean"),
        ({"weights": {"q": {"math": 1}}}, "merge.per_layer.weights.q lacks expert 'code'"),
    ],
)
def test_faults_name_the_key(per_layer, words, method):
    with pytest.raises(ConfigError) as caught:
        method("ties", per_layer=per_layer)
    assert words in str(caught.value)
