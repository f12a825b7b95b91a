"""NuSLERP and multi-SLERP against numpy with acos, the Karcher mean against its defining equation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError, NumericsError
from rotrl.merge.spherical import karcher, multislerp, nuslerp, slerp

SEEDS = st.integers(0, 10**6)
WEIGHTS = st.lists(st.floats(0.1, 3), min_size=3, max_size=3)
unit = lambda x: x / np.linalg.norm(x)  # noqa: E731


def oracle_arc(a, b, t):
    angle = np.arccos(np.clip(unit(a) @ unit(b), -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("axis", ["tensor", "row", "column"])
@pytest.mark.parametrize("vectors", ["task", "model"])
@given(seed=SEEDS, weights=st.lists(st.floats(0.2, 2), min_size=2, max_size=2), scale=st.floats(0, 2))
def test_nuslerp(axis, vectors, seed, weights, scale, models, run, close):
    base, experts = models(seed, count=2)
    origin = base if vectors == "task" else np.zeros_like(base)
    a, b = (e - origin for e in experts)
    t = weights[1] / sum(weights)
    if axis == "tensor":
        arc = oracle_arc(a.ravel(), b.ravel(), t).reshape(a.shape)
    elif axis == "row":
        arc = np.array([oracle_arc(x, y, t) for x, y in zip(a, b, strict=True)])
    else:
        arc = np.array([oracle_arc(x, y, t) for x, y in zip(a.T, b.T, strict=True)]).T
    expected = base + scale * (origin + arc - base)
    close(run(nuslerp, base, experts, axis=axis, vectors=vectors, weights=weights, scale=scale), expected)


@pytest.mark.parametrize("axis", ["tensor", "row", "column"])
def test_nuslerp_takes_the_chord_where_there_is_no_arc(axis, run, close):
    base, one = np.zeros((2, 3)), np.ones((2, 3))
    close(run(nuslerp, base, [one, -3 * one], axis=axis), -one)
    close(run(nuslerp, base, [one, base], axis=axis), 0.5 * one)
    close(run(nuslerp, base, [one, 3 * one], axis=axis), 2 * one)


@given(seed=SEEDS, weights=WEIGHTS, scale=st.floats(0, 2))
def test_multislerp_as_mergekit_defines_it(seed, weights, scale, models, run, close):
    """With the tangent average that vanishes."""
    base, experts = models(seed)
    w = np.array(weights) / sum(weights)
    d = [(e - base).ravel() for e in experts]
    mean = unit(sum(c * unit(x) for c, x in zip(w, d, strict=True)))
    tangent = sum(c * (unit(x) - (unit(x) @ mean) * mean) for c, x in zip(w, d, strict=True))
    size = np.linalg.norm(tangent) + 1e-8
    on_sphere = mean * np.cos(size) + tangent * np.sin(size) / size
    expected = sum(c * np.linalg.norm(x) for c, x in zip(w, d, strict=True)) * on_sphere
    close(run(multislerp, base, experts, weights=weights, scale=scale), base + scale * expected.reshape(base.shape))


@given(seed=SEEDS, weights=WEIGHTS, size=st.sampled_from([1e-3, 0.3, 3.0]))
def test_karcher_mean_is_where_the_weighted_logarithms_cancel(seed, weights, size, models, run):
    base, experts = models(seed, size=size)
    merged = run(karcher, base, experts, weights=weights, tol=1e-13, max_iter=200, dtype=torch.float64)
    w = np.array(weights) / sum(weights)
    assert np.linalg.norm(merged) == pytest.approx(sum(c * np.linalg.norm(e) for c, e in zip(w, experts, strict=True)))
    u, total = unit(merged).ravel(), 0
    for c, expert in zip(w, experts, strict=True):
        v = unit(expert).ravel()
        across = v - (u @ v) * u
        total = total + c * np.arctan2(np.linalg.norm(across), u @ v) * unit(across)
    assert np.linalg.norm(total) < 1e-9


@given(seed=SEEDS)
def test_karcher_of_two_is_the_middle_of_their_arc(seed, models, run, close):
    base, experts = models(seed, count=2)
    close(run(karcher, base, experts), run(slerp, base, experts))


def test_default_tolerance_is_far_below_the_update(models, run):
    base, experts = models(size=1e-3, shape=(20, 30))
    exact = run(karcher, base, experts, tol=1e-14, max_iter=100, dtype=torch.float64)
    error = np.linalg.norm(run(karcher, base, experts, dtype=torch.float64) - exact)
    assert error < 1e-4 * np.linalg.norm(experts[0] - base)


def test_no_direction(run):
    one, zero = np.ones((2, 2)), np.zeros((2, 2))
    for function in (karcher, multislerp):
        with pytest.raises(NumericsError, match="cancel"):
            run(function, zero, [one, -one])
        assert (run(function, zero, [zero, zero]) == 0).all()
    with pytest.raises(ConfigError, match="sum to 0"):
        run(karcher, zero, [one, one], weights=[1.0, -1.0])


@pytest.mark.parametrize("function", [nuslerp, multislerp, karcher])
@given(seed=SEEDS)
def test_identities(function, seed, models, run, close):
    base, experts = models(seed, count=2)
    close(run(function, base, [experts[0], experts[0]]), experts[0])
    close(run(function, base, experts), run(function, base, experts[::-1]))
    if function is not karcher:
        assert np.array_equal(run(function, base, experts, scale=0.0), base)
    if function is not nuslerp:
        close(run(function, base, experts[:1]), experts[0])
