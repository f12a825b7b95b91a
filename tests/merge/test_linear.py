"""Linear, sparse and spherical methods against float64 numpy oracles written from the papers' formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError, NumericsError
from rotrl.merge.linear import interpolation, linear, model_stock, task_arithmetic
from rotrl.merge.sparse import dare_ties, ties, trim
from rotrl.merge.spherical import slerp

SEEDS = st.integers(0, 10**6)
WEIGHTS = st.lists(st.floats(0.1, 3), min_size=3, max_size=3)


def models(seed=0, shape=(4, 6), count=3, size=0.3):
    """A base and `count` experts, float64 numpy."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base, [base + size * rng.standard_normal(shape) for _ in range(count)]


def run(function, base, experts, **hyper):
    merged = function(torch.tensor(base).float(), [torch.tensor(e).float() for e in experts], **hyper)
    assert merged.dtype == torch.float32
    return merged.double().numpy()


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=3e-6 * max(1, np.abs(expected).max()))


@given(seed=SEEDS, weights=WEIGHTS, scale=st.floats(-2, 2))
def test_linear_and_task_arithmetic(seed, weights, scale):
    base, experts = models(seed)
    total = sum(w * e for w, e in zip(weights, experts, strict=True))
    close(run(linear, base, experts, weights=weights), total / sum(weights))
    close(run(linear, base, experts, weights=weights, normalize=False), total)
    close(run(linear, base, experts), sum(experts) / 3)
    vectors = sum(w * (e - base) for w, e in zip(weights, experts, strict=True))
    close(run(task_arithmetic, base, experts, weights=weights, scale=scale), base + scale * vectors)


def test_weights_that_cancel_are_refused():
    base, experts = models(count=2)
    with pytest.raises(ConfigError, match="sum to 0"):
        run(linear, base, experts, weights=[0.5, -0.5])


@given(seed=SEEDS, t=st.floats(-0.5, 1.5))
def test_interpolation(seed, t):
    base, experts = models(seed, count=2)
    close(run(interpolation, base, experts, t=t), (1 - t) * experts[0] + t * experts[1])


@given(seed=SEEDS, count=st.integers(2, 4))
def test_model_stock(seed, count):
    base, experts = models(seed, count=count)
    d = [(e - base).ravel() for e in experts]
    cosines = [
        d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j]) for i in range(count) for j in range(count) if i != j
    ]
    cosine = np.mean(cosines)
    t = max(-1, count * cosine / (1 + (count - 1) * cosine))
    close(run(model_stock, base, experts), t * sum(experts) / count + (1 - t) * base)


def test_model_stock_of_two_is_the_papers_special_case():
    """t = 2 cos / (1 + cos); a right angle gives the base."""
    base = np.zeros((2, 2))
    experts = [np.array([[1.0, 0], [0, 0]]), np.array([[0, 1.0], [0, 0]])]
    close(run(model_stock, base, experts), base)
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    close(run(model_stock, base, [experts[0], experts[0] + experts[1]]), t * np.array([[1, 0.5], [0, 0]]))


def test_model_stock_of_updates_that_cancel_is_the_base():
    """The formula has its pole there; near it t is held at -1."""
    base, d = np.zeros((2, 2)), np.array([[1.0, 0], [0, 0]])
    close(run(model_stock, base, [d, -d]), base)
    close(run(model_stock, base, [d, -d + 1e-3 * np.eye(2)[::-1]]), -0.5e-3 * np.eye(2)[::-1])
    third = 2 * np.pi / 3
    around = [np.array([[np.cos(k * third), np.sin(k * third)]]) for k in range(3)]
    close(run(model_stock, np.zeros((1, 2)), around), np.zeros((1, 2)))


def oracle_ties(base, experts, density, scale, weights, normalize):
    """Entry by entry."""
    trimmed = []
    for expert in experts:
        d = expert - base
        order = np.sort(np.abs(d).ravel())[::-1]
        trimmed.append(np.where(np.abs(d) >= order[max(1, round(density * d.size)) - 1], d, 0))
    merged = np.zeros_like(base)
    for index in np.ndindex(*base.shape):
        entries = [(w, d[index]) for w, d in zip(weights, trimmed, strict=True)]
        sign = np.sign(sum(w * x for w, x in entries))
        kept = [(w, x) for w, x in entries if np.sign(x) == sign and x != 0]
        if kept:
            merged[index] = sum(w * x for w, x in kept) / (sum(w for w, _ in kept) if normalize else 1)
    return base + scale * merged


@given(seed=SEEDS, density=st.floats(0.05, 1), scale=st.floats(0, 2), weights=WEIGHTS, normalize=st.booleans())
def test_ties(seed, density, scale, weights, normalize):
    base, experts = models(seed)
    base, experts = base.astype(np.float32).astype(float), [e.astype(np.float32).astype(float) for e in experts]
    expected = oracle_ties(base, experts, density, scale, weights, normalize)
    actual = run(ties, base, experts, density=density, scale=scale, weights=weights, normalize=normalize)
    close(actual, expected)


@given(seed=SEEDS, density=st.floats(0.01, 1))
def test_trim_keeps_the_largest(seed, density):
    d = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    kept = trim(d, density) != 0
    assert kept.sum() == max(1, round(density * 35))
    assert density == 1 or kept.all() or d[kept].abs().min() >= d[~kept].abs().max()


def test_trim_keeps_equal_entries_together():
    """No order among equal magnitudes: which of them would stay must not depend on where they stand."""
    assert (trim(torch.ones(2, 5), 0.3) == 1).all()


@given(seed=SEEDS, density=st.floats(0.1, 1), rescale=st.booleans(), normalize=st.booleans())
def test_dare_ties(seed, density, rescale, normalize):
    base, experts = models(seed)
    generator = np.random.SFC64(seed)
    dropped = []
    for expert in experts:
        words = generator.random_raw(-(-base.size // 2)).view(np.int32)[: base.size]
        mask = (words / 2**32 + 0.5 < density).reshape(base.shape)
        dropped.append(base + (expert - base) * mask / (density if rescale else 1))
    expected = oracle_ties(base, dropped, 1.0, 0.7, [1.0] * 3, normalize)
    hyper = {"density": density, "scale": 0.7, "seed": seed, "rescale": rescale, "normalize": normalize}
    close(run(dare_ties, base, experts, **hyper), expected)


def test_dare_keeps_the_mean_and_the_density():
    base, expert = torch.zeros(400, 400), torch.ones(400, 400)
    merged = dare_ties(base, [expert], density=0.25)
    assert (merged != 0).float().mean() == pytest.approx(0.25, abs=0.005)
    assert merged.mean() == pytest.approx(1, abs=0.02)


@given(seed=SEEDS, t=st.floats(0, 1), size=st.sampled_from([1e-4, 0.3, 3.0]))
def test_slerp(seed, t, size):
    base, (a, b) = models(seed, count=2, size=size)
    u, v = a.ravel() / np.linalg.norm(a), b.ravel() / np.linalg.norm(b)
    angle = 2 * np.arcsin(np.linalg.norm(u - v) / 2)
    on_sphere = (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)
    expected = ((1 - t) * np.linalg.norm(a) + t * np.linalg.norm(b)) * on_sphere.reshape(a.shape)
    close(run(slerp, base, [a, b], t=t), expected)


def test_slerp_is_no_chord_at_the_scale_of_reinforcement_learning():
    """The arc leaves the chord by |d|^2 / 8: a threshold on the cosine such as .9995 would switch it off."""
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 1e-2], dtype=torch.float64)
    assert slerp(a, (a, b / b.norm()), t=0.5).norm() == pytest.approx(1, abs=1e-12)


def test_slerp_of_opposite_and_of_zero_tensors():
    one = torch.ones(2, 2)
    with pytest.raises(NumericsError, match="opposite"):
        slerp(one, (one, -one))
    assert torch.equal(slerp(one, (one, torch.zeros(2, 2)), t=0.25), 0.75 * one)


@pytest.mark.parametrize("function", [linear, task_arithmetic, ties, model_stock])
@given(seed=SEEDS)
def test_order_of_experts_does_not_matter(function, seed):
    base, experts = models(seed)
    close(run(function, base, experts), run(function, base, experts[::-1]))


IDENTITY = {
    linear: {},
    task_arithmetic: {"scale": 1 / 3},
    ties: {"density": 1.0},
    dare_ties: {"density": 1.0, "scale": 1 / 3},
    model_stock: {},
}


@pytest.mark.parametrize("function", IDENTITY)
@given(seed=SEEDS)
def test_equal_experts_give_that_expert(function, seed):
    base, experts = models(seed, count=1)
    close(run(function, base, experts * 3, **IDENTITY[function]), experts[0])


@pytest.mark.parametrize("function", [interpolation, slerp])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_equal_pairs_and_ends(function, t):
    base, (a, b) = models(count=2)
    close(run(function, base, [a, a], t=t), a)
    close(run(function, base, [a, b], t=0.0), a)
    close(run(function, base, [a, b], t=1.0), b)


@pytest.mark.parametrize("function", [task_arithmetic, ties, dare_ties])
def test_one_expert_at_scale_1_and_any_at_scale_0(function):
    base, experts = models()
    hyper = {} if function is task_arithmetic else {"density": 1.0}
    close(run(function, base, experts[:1], **hyper), experts[0])
    assert np.array_equal(run(function, base, experts, scale=0.0), base.astype(np.float32))
