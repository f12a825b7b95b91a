"""Scale rules: every one against its definition, on methods that are linear in the scale and on one that is not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.checkpoint.layout import Role
from rotrl.errors import ConfigError, NumericsError
from rotrl.merge import chunks
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.linear import task_arithmetic
from rotrl.merge.rotation import lie_sum
from rotrl.merge.scale import GLOBAL, RULES, at_scale
from rotrl.merge.sparse import ties

SEEDS = st.integers(0, 10**6)


def merged(function, rule, base, experts, **hyper):
    w0, ws = torch.tensor(base), [torch.tensor(e) for e in experts]
    [(_, _, result)] = at_scale(lambda hyper: [(w0, ws, function(w0, ws, **hyper))], len(ws), {"scale": rule, **hyper})
    return result.numpy()


@pytest.mark.parametrize("function", [task_arithmetic, ties, lie_sum])
@given(seed=SEEDS)
def test_rules(function, seed, models):
    base, experts = models(seed, size=0.05)
    d = [e - base for e in experts]
    one, third = (merged(function, scale, base, experts) for scale in (1.0, 1 / 3))
    np.testing.assert_array_equal(merged(function, "sum", base, experts), one)
    np.testing.assert_array_equal(merged(function, "mean", base, experts), third)
    update = merged(function, "norm", base, experts) - base
    assert np.linalg.norm(update) == pytest.approx(np.mean([np.linalg.norm(x) for x in d]))
    np.testing.assert_allclose(update / np.linalg.norm(update), (one - base) / np.linalg.norm(one - base), atol=1e-9)
    update = merged(function, "retention", base, experts) - base
    assert sum((update * x).sum() for x in d) == pytest.approx(sum((x * x).sum() for x in d))


def test_retention_of_equal_norms_solves_for_the_coefficients():
    d = np.array([[1.0, 0, 0], [0.6, 0.8, 0]])
    c = np.linalg.solve(d @ d.T, np.diag(d @ d.T))
    update = merged(task_arithmetic, "retention", np.zeros((1, 3)), [x[None] for x in d])
    np.testing.assert_allclose(update[0], c @ d)


def test_mean_divides_by_the_weights(models):
    base, experts = models(count=2)
    expected = 0.25 * experts[0] + 0.75 * experts[1]
    np.testing.assert_allclose(merged(task_arithmetic, "mean", base, experts, weights=[1.0, 3.0]), expected)


def test_weights_that_cancel_have_no_mean(models):
    base, experts = models(count=2)
    with pytest.raises(ConfigError, match=r"merge\.weights sum to 0"):
        merged(task_arithmetic, "mean", base, experts, weights=[1.0, -1.0])


def test_equal_experts_give_that_expert_by_every_rule_but_the_sum(models):
    base, experts = models(count=1)
    for rule in ("mean", "norm", "retention"):
        np.testing.assert_allclose(merged(task_arithmetic, rule, base, experts * 4), experts[0], atol=1e-12)


def test_updates_that_vanish(models):
    base, (expert, *_) = models()
    for rule in RULES:
        np.testing.assert_array_equal(merged(task_arithmetic, rule, base, [base, base]), base)
    for rule in ("norm", "retention"):
        with pytest.raises(NumericsError, match=f"merge.scale={rule}"):
            merged(task_arithmetic, rule, base, [expert, 2 * base - expert])


def test_rules_hold_outside_the_scope_too(method):
    base, experts = torch.zeros(4), [torch.ones(4), 3 * torch.ones(4)]
    norm = method("tsv_m", scale="norm")("x", Role(0, "norm"), base, experts)
    assert norm.norm() == pytest.approx(4)


def test_what_may_stand_for_a_scale(method):
    for rule in RULES:
        assert method("ties", scale=rule).hyper["scale"] == rule
    with pytest.raises(ConfigError, match=r"merge\.scale is 'large', a number or one of mean, norm, sum, retention"):
        method("ties", scale="large")
    with pytest.raises(ConfigError, match=r"merge\.density is 'mean', a number is expected"):
        method("ties", density="mean")


@pytest.mark.parametrize("rule", GLOBAL)
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "tsv_m", "iso_c"])
def test_one_factor_for_the_whole_model(name, rule, trio, method, monkeypatch):
    monkeypatch.setattr(chunks, "ENTRIES", 100)
    base, experts = trio
    flat = lambda state: np.concatenate([tensor.double().numpy().ravel() for tensor in state.values()])  # noqa: E731
    w0 = flat({name: base.read(name) for name in base.tensors})
    d = [flat({name: expert.read(name) for name in base.tensors}) - w0 for expert in experts.values()]
    at_1 = flat(merge_state(*trio, method(name, scale=1.0))) - w0
    if rule == "norm_global":
        factor = np.mean([np.linalg.norm(x) for x in d]) / np.linalg.norm(at_1)
    else:
        factor = sum(x @ x for x in d) / sum(at_1 @ x for x in d)
    bound = method(name, scale=rule)
    assert bound.passes == 2
    np.testing.assert_allclose(flat(merge_state(*trio, bound)) - w0, factor * at_1, atol=2e-6)


def test_one_factor_under_another_method_and_in_the_report(trio, method, shipped, tmp_path):
    on_top = method("svc", of=shipped("ties", scale="norm_global"), alpha=1.0)
    below, whole = merge_state(*trio, method("ties", scale="norm_global")), merge_state(*trio, on_top)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(whole[name], below[name])
    assert (on_top.scale, on_top.passes) == ("norm_global", 2)
    result = merge(*trio, method("task_arithmetic", scale="norm_global"), tmp_path / "out")
    assert result["norm_ratio"] == pytest.approx(1, abs=1e-5)
    assert result["effective_coefficient"] == pytest.approx(0.5**0.5, abs=0.05)
    told = merge(*trio, method("task_arithmetic", scale="retention_global"), tmp_path / "other")
    c = np.array([*told["coefficients"].values()])
    assert c[0] == pytest.approx(c[1])
