"""Methods on top of another: SVC, subspace boosting, spectrum projection; and how the engine stacks them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.on_top import spectrum_projection, subspace_boosting, svc

SEEDS = st.integers(0, 10**6)
SHAPED = pytest.mark.parametrize("shape", [(6, 6), (4, 9), (8, 3)])
F64 = {"dtype": torch.float64}


def summed(base, experts):
    return torch.tensor(base + sum(e - base for e in experts))


@SHAPED
@given(seed=SEEDS, alpha=st.floats(0.05, 1))
def test_svc(shape, seed, alpha, models, run):
    base, experts = models(seed, shape=shape)
    d = sum(e - base for e in experts)
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    expected = base.copy()
    for r in range(len(s)):
        total = 0
        for expert in experts:
            part = u[:, r] @ (expert - base)
            total += max(alpha, (u[:, r] @ d) @ part / (part @ part))
        expected += len(experts) / total * s[r] * np.outer(u[:, r], vh[r])
    actual = run(svc, base, experts, merged=summed(base, experts), alpha=alpha, **F64)
    np.testing.assert_allclose(actual, expected, atol=1e-8)


@SHAPED
def test_svc_counts_a_shared_update_once_and_leaves_separate_ones(shape, models, run):
    base, experts = models(shape=shape, count=1)
    merged = torch.tensor(base + 3 * (experts[0] - base))
    np.testing.assert_allclose(run(svc, base, experts * 3, merged=merged, **F64), experts[0], atol=1e-10)
    base, (first, second) = np.zeros((4, 4)), (np.diag([3.0, 2, 0, 0]), np.diag([0, 0, 1.0, 0.5]))
    apart = run(svc, base, [first, second], merged=torch.tensor(first + second), **F64)
    np.testing.assert_allclose(apart, first + second, atol=1e-12)


@SHAPED
@given(seed=SEEDS, beta=st.floats(0, 1))
def test_subspace_boosting(shape, seed, beta, models, run):
    base, experts = models(seed, shape=shape)
    u, s, vh = np.linalg.svd(sum(e - base for e in experts), full_matrices=False)
    cut = next((x for x, share in zip(s, s.cumsum() / s.sum(), strict=True) if share >= beta), s[-1])
    expected = base + u @ np.diag(np.maximum(s, cut)) @ vh
    actual = run(subspace_boosting, base, experts, merged=summed(base, experts), beta=beta, **F64)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


@SHAPED
@given(seed=SEEDS)
def test_spectrum_projection(shape, seed, models, run):
    base, experts = models(seed, shape=shape)
    merged = summed(base, experts)
    projected = run(spectrum_projection, base, experts, merged=merged, **F64)
    values = lambda w: np.linalg.svd(w, compute_uv=False)  # noqa: E731
    np.testing.assert_allclose(values(projected), values(base), atol=1e-10)
    mean = run(spectrum_projection, base, experts, merged=merged, reference="mean", **F64)
    np.testing.assert_allclose(values(mean), np.mean([values(e) for e in experts], axis=0), atol=1e-10)
    u, _, vh = np.linalg.svd(merged.numpy(), full_matrices=False)
    np.testing.assert_allclose(projected, u @ np.diag(values(base)) @ vh, atol=1e-9)
    alone = run(spectrum_projection, base, experts[:1], merged=torch.tensor(experts[0]), reference="mean", **F64)
    np.testing.assert_allclose(alone, experts[0], atol=1e-10)


def test_base_stays_the_base(models, run):
    base, _ = models(shape=(5, 7))
    for function in (svc, subspace_boosting, spectrum_projection):
        actual = run(function, base, [base, base], merged=torch.tensor(base), **F64)
        np.testing.assert_allclose(actual, base, atol=1e-12)


@pytest.mark.parametrize("of", ["ties", "ram_plus", "tsv_m", "spectrum_projection"])
def test_engine_hands_over_the_merge_of_the_method_below(of, trio, method, shipped):
    base, experts = trio
    below = merge_state(*trio, method(of))
    top = method("subspace_boosting", of=shipped(of), beta=0.3)
    for name, merged in merge_state(*trio, top).items():
        w0, ws = base.read(name), [e.read(name) for e in experts.values()]
        if any(part in name for part in ("_proj.weight",)):
            assert torch.equal(merged, subspace_boosting(w0, ws, merged=below[name], beta=0.3))
        else:
            assert torch.equal(merged, below[name])


def test_another_method_below_is_another_merge(trio, method, shipped, tmp_path):
    merge(*trio, method("svc"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another merge \(other merge\.of"):
        merge(*trio, method("svc", of=shipped("ties")), tmp_path / "out")


def test_faults_below_are_named(method, shipped):
    with pytest.raises(ConfigError, match=r"merge\.alpha is 0, .*merge\.of\.density is 7, it must lie in \(0, 1\]"):
        method("svc", alpha=0, of=shipped("ties", density=7))
    with pytest.raises(ConfigError, match=r"merge\.of\._target_ '' is no merge method"):
        method("svc", of=None)
    with pytest.raises(ConfigError, match=r"unknown parameter merge\.of of ties"):
        method("ties", of=shipped("linear"))
    assert method("svc", of=shipped("learned")).needs_rotations
