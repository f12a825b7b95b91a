"""Means of rotations and OrthoMerge's conflict variant against scipy; where the means agree and where they must."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError, NumericsError
from rotrl.merge.linear import task_arithmetic
from rotrl.merge.mean_rotation import chordal, karcher_rotation, lie_mean
from rotrl.merge.rotation import orthomerge

SEEDS = st.integers(0, 10**6)
SIDED = pytest.mark.parametrize("side", ["left", "right"])
SHAPED = pytest.mark.parametrize("shape", [(5, 5), (2, 9), (8, 3)])
MEANS = (lie_mean, karcher_rotation, chordal)
F64 = {"dtype": torch.float64}
logm, expm = (lambda m: scipy.linalg.logm(m).real), (lambda m: scipy.linalg.expm(m).real)


def fit(source, target, side, anchor=0.01):
    if side == "left":
        return fit(source.T, target.T, "right", anchor).T
    mu = anchor * (source**2).sum() / min(source.shape)
    return scipy.linalg.polar(source.T @ target + mu * np.eye(source.shape[1]))[0]


def turn(w, r, side):
    return w @ r if side == "right" else r @ w


def mean_of(function, rotations, w):
    if function is lie_mean:
        return expm(sum(c * logm(r) for c, r in zip(w, rotations, strict=True)))
    if function is chordal:
        return scipy.linalg.polar(sum(c * r for c, r in zip(w, rotations, strict=True)))[0]
    mean = rotations[0]
    for _ in range(20):
        step = expm(sum(c * logm(mean.T @ r) for c, r in zip(w, rotations, strict=True)))
        mean = scipy.linalg.polar(mean @ step)[0]
    return mean


@pytest.mark.parametrize("function", MEANS)
@SIDED
@SHAPED
@pytest.mark.parametrize("seed", range(4))
def test_oracle(function, side, shape, seed, models, run):
    base, experts = models(seed, shape=shape, size=0.1)
    weights = np.random.default_rng(seed).uniform(0.2, 2, 3)
    w, scale = weights / weights.sum(), 0.25 * (seed + 1)
    rotations = [fit(base, e, side) for e in experts]
    mean = mean_of(function, rotations, w)
    rest = sum(c * (e - turn(base, r, side)) for c, e, r in zip(w, experts, rotations, strict=True))
    expected = turn(base, expm(scale * logm(mean)), side) + scale * 0.7 * rest
    actual = run(function, base, experts, side=side, weights=weights.tolist(), scale=scale, residual_scale=0.7, **F64)
    np.testing.assert_allclose(actual, expected, atol=1e-8)


@pytest.mark.parametrize("function", MEANS)
@SIDED
@SHAPED
@given(seed=SEEDS)
def test_identities(function, side, shape, seed, models, run):
    base, experts = models(seed, shape=shape, size=0.05)
    np.testing.assert_allclose(run(function, base, experts[:1] * 3, side=side, **F64), experts[0], atol=1e-9)
    np.testing.assert_allclose(run(function, base, experts[:1], side=side, **F64), experts[0], atol=1e-9)
    np.testing.assert_allclose(run(function, base, experts, side=side, scale=0.0, **F64), base, atol=1e-9)
    again = run(function, base, experts[::-1], side=side, **F64)
    np.testing.assert_allclose(run(function, base, experts, side=side, **F64), again, atol=1e-9)


@SHAPED
@pytest.mark.parametrize("function", MEANS)
def test_linear_mean_at_first_order(function, shape, models, run):
    base, experts = models(shape=shape, size=1.0)

    def difference(h):
        ws = [base + h * (e - base) for e in experts]
        return np.linalg.norm(run(function, base, ws, **F64) - run(task_arithmetic, base, ws, scale=1 / 3, **F64))

    assert math.log10(difference(1e-2) / difference(1e-3)) == pytest.approx(2, abs=0.15)


def test_mean_of_two_rotations_is_the_same_on_the_group_and_around_it(models, run):
    base, experts = models(shape=(6, 4), count=2, size=0.1)
    karcher, chord = (run(function, base, experts, **F64) for function in (karcher_rotation, chordal))
    np.testing.assert_allclose(karcher, chord, atol=1e-10)


def test_what_has_no_mean(models, run):
    base, experts = models(shape=(5, 5), size=0.1)
    for function in MEANS:
        with pytest.raises(ConfigError, match="sum to 0"):
            run(function, base, experts[:2], weights=[1.0, -1.0])
    with pytest.raises(NumericsError, match="no mean rotation within 1 steps"):
        run(karcher_rotation, base, experts, max_iter=1, **F64)


def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


@SIDED
@SHAPED
@given(seed=SEEDS)
def test_orthomerge_by_conflict(side, shape, seed, models, run):
    base, experts = models(seed, shape=shape, size=0.1)
    if side == "left":
        again = run(orthomerge, base.T, [e.T for e in experts], variant="conflict", **F64).T
        actual = run(orthomerge, base, experts, variant="conflict", side="left", **F64)
        np.testing.assert_allclose(actual, again, atol=1e-9)
        return
    mean = sum(e - base for e in experts) / 3
    targets = [base.copy() for _ in experts]
    for target, expert in zip(targets, experts, strict=True):
        for i in range(shape[0]):
            if cosine((expert - base)[i], mean[i]) < 0:
                target[i] = expert[i]
    rotations = [fit(base, t, "right") for t in targets]
    identity = np.eye(shape[1])
    q = [np.linalg.inv(r + identity) @ (r - identity) for r in rotations]
    total = sum(q)
    if np.linalg.norm(total) > 1e-9:
        total = total * np.mean([np.linalg.norm(x) for x in q]) / np.linalg.norm(total)
    rest = sum(e - base @ r for e, r in zip(experts, rotations, strict=True))
    expected = base @ np.linalg.inv(identity - total) @ (identity + total) + 0.2 * rest
    np.testing.assert_allclose(run(orthomerge, base, experts, variant="conflict", **F64), expected, atol=1e-9)


def test_without_conflict_nothing_turns(models, run):
    base, experts = models(shape=(5, 5), count=1, size=0.1)
    merged = run(orthomerge, base, experts * 2, variant="conflict", residual_scale=0.5, **F64)
    np.testing.assert_allclose(merged, experts[0], atol=1e-10)
