"""CORAM against scipy, slice by slice, and its first order."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.merge.coram import coram
from rotrl.merge.linear import task_arithmetic

F64 = {"dtype": torch.float64}
SHAPES = [(8, 12), (7, 5), (3, 9), (12, 4)]


def slices(w, height):
    return [w[i : i + height] for i in range(0, len(w), height)]


def oracle(base, experts, height, kappa):
    rows = []
    for w0, *ws in zip(slices(base, height), *(slices(e, height) for e in experts), strict=True):
        u0, s0, _ = np.linalg.svd(w0, full_matrices=False)
        logs, stretches, frames = [], [], []
        for w in ws:
            u, s, vh = np.linalg.svd(w, full_matrices=False)
            sign = np.sign(np.diag(u0.T @ u))
            logs.append(scipy.linalg.logm(scipy.linalg.polar(u0.T @ u @ np.diag(sign))[0]).real)
            stretches.append(np.diag(s / s0) - np.eye(len(s)))
            frames.append(vh.T @ np.diag(sign))
        q, ds = scipy.linalg.expm(np.mean(logs, axis=0)), np.mean(stretches, axis=0)
        v = scipy.linalg.polar(np.mean(frames, axis=0))[0]
        rows.append(u0 @ q @ np.diag(s0) @ (np.eye(len(s0)) + ds) @ v.T)
    return base + kappa * math.sqrt(len(experts)) * (np.vstack(rows) - base)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("height", [1, 3, 4])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 3))
def test_oracle(shape, height, seed, count, models, run):
    base, experts = models(seed, shape=shape, count=count, size=1e-3)
    expected = oracle(base, experts, height, 1.15)
    update = max(np.linalg.norm(e - base) for e in experts)
    actual = run(coram, base, experts, height=height, **F64)
    np.testing.assert_allclose(actual, expected, atol=1e-6 * update)


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic_at_first_order(shape, models, run):
    """Slope 2 of the difference over the size of the update."""
    base, experts = models(shape=shape, count=2, size=1.0)

    def difference(h):
        ws = [base + h * (e - base) for e in experts]
        scale = 1.15 / math.sqrt(2)
        return np.linalg.norm(
            run(coram, base, ws, height=4, **F64) - run(task_arithmetic, base, ws, scale=scale, **F64)
        )

    assert math.log10(difference(1e-4) / difference(1e-5)) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_identities(shape, models, run):
    base, experts = models(shape=shape, size=0.02)
    one = run(coram, base, experts[:1], kappa=1.0, **F64)
    np.testing.assert_allclose(one, experts[0], atol=1e-10)
    alike = run(coram, base, experts[:1] * 4, kappa=0.5, **F64)
    np.testing.assert_allclose(alike, experts[0], atol=1e-10)
    np.testing.assert_allclose(run(coram, base, experts, scale=0.0, **F64), base, atol=1e-12)
    again = run(coram, base, experts[::-1], **F64)
    np.testing.assert_allclose(run(coram, base, experts, **F64), again, atol=1e-10)


def test_large_updates_that_reorder_singular_vectors_stay_rotations(models, run):
    """With signs nearest to the base's alone every other frame would be reflected and have no logarithm."""
    for seed in range(30):
        base, experts = models(seed, shape=(16, 40), count=2, size=0.5)
        merged = run(coram, base, experts, **F64)
        assert np.linalg.norm(merged - base) < 3 * max(np.linalg.norm(e - base) for e in experts)
