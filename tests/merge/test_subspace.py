"""Iso-CTS, KnOTS, rewiring, ResMerge and WUDI against numpy written from the formulas; their identities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.merge.residual import resmerge, wudi
from rotrl.merge.sparse import ties
from rotrl.merge.subspace import iso_c, iso_cts, knots_ties, rewiring

SEEDS = st.integers(0, 10**6)
SHAPED = pytest.mark.parametrize("shape", [(10, 10), (7, 16), (12, 5)])
F64 = {"dtype": torch.float64}


def triplets(matrix, rank):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def polar(matrix):
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


@SHAPED
@given(seed=SEEDS, fraction=st.floats(0, 1), count=st.integers(1, 4))
def test_iso_cts(shape, seed, fraction, count, models, run):
    base, experts = models(seed, shape=shape, count=count)
    r = min(shape)
    each = min(round((r - int(fraction * r)) / count), r // count)
    d = [e - base for e in experts]
    parts = [triplets(sum(d), r - each * count)]
    left = parts[0][0]
    parts += [triplets((np.eye(shape[0]) - left @ left.T) @ x, each) for x in d]
    u, s, v = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
    expected = base + 0.7 * s.mean() * polar(u) @ polar(v).T
    actual = run(iso_cts, base, experts, scale=0.7, common_fraction=fraction, **F64)
    if np.linalg.svd(u)[1][-1] > 1e-6 and np.linalg.svd(v)[1][-1] > 1e-6:  # else the polar factor is arbitrary
        np.testing.assert_allclose(actual, expected, atol=1e-8)


@SHAPED
def test_iso_cts_without_specific_directions_is_iso_c(shape, models, run):
    base, experts = models(shape=shape)
    iso = run(iso_c, base, experts, **F64)
    np.testing.assert_allclose(run(iso_cts, base, experts, common_fraction=1.0, **F64), iso, atol=1e-9)


@SHAPED
@given(seed=SEEDS, density=st.floats(0.1, 1), normalize=st.booleans())
def test_knots_ties(shape, seed, density, normalize, models, run):
    """Trimmed, elected and averaged entry by entry in the basis of the updates side by side."""
    base, experts = models(seed, shape=shape, count=2)
    d = [e - base for e in experts]
    u = np.linalg.svd(np.hstack(d), full_matrices=False)[0]
    kept = []
    for part in [u.T @ x for x in d]:
        least = np.sort(abs(part), axis=None)[::-1][max(1, round(density * part.size)) - 1]
        kept.append(np.where(abs(part) >= least * (1 - 1e-12), part, 0))
    sign = np.sign(sum(kept))
    agreeing = [np.where(x * sign > 0, x, 0) for x in kept]
    divisor = np.maximum(1, sum(x != 0 for x in agreeing)) if normalize else 1
    expected = base + 0.6 * u @ (sum(agreeing) / divisor)
    actual = run(knots_ties, base, experts, density=density, normalize=normalize, scale=0.6, **F64)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_knots_ties_finds_the_rotation_that_ties_needs(run):
    """Updates of one direction each, sparse but for a common rotation of the outputs."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    d = [np.diag([2.0, 0, 0, 0, 0, 0]), np.diag([0, 1.0, 0, 0, 0, 0])]
    base, experts = np.zeros((6, 6)), [rotation @ x for x in d]
    merged = run(knots_ties, base, experts, density=1 / 12, **F64)
    np.testing.assert_allclose(merged, sum(experts), atol=1e-12)
    assert np.linalg.norm(run(ties, base, experts, density=1 / 12, **F64) - sum(experts)) > 0.3


@SHAPED
@given(seed=SEEDS, rank=st.integers(1, 20), share=st.floats(0.01, 1))
def test_rewiring(shape, seed, rank, share, models, run):
    base, experts = models(seed, shape=shape)
    u, _, v = triplets(base, rank)
    total = 0
    for expert in experts:
        x, s, y = triplets(expert - base, max(1, round(share * min(shape))))
        total = total + x @ np.diag(s) @ y.T
    expected = base + 0.5 * u @ u.T @ total @ v @ v.T
    actual = run(rewiring, base, experts, svd_rank=rank, delta_fraction=share, scale=0.5, **F64)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


def cosine(x, y):
    return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)


@SHAPED
@pytest.mark.parametrize("common", [0.0, 1.0])
@given(seed=SEEDS, count=st.integers(2, 4))
def test_resmerge(shape, common, seed, count, models, run):
    base, experts = models(seed, shape=shape, count=count)
    experts = [e + common * (experts[0] - base) for e in experts]
    d = [e - base for e in experts]
    heads = [x @ np.diag(s) @ y.T for x, s, y in (triplets(t, 1) for t in d)]
    rests = [x - h for x, h in zip(d, heads, strict=True)]
    q = sum(r / np.linalg.norm(r) for r in rests)
    q = q / np.linalg.norm(q)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    s = np.mean([cosine(rests[i], rests[j]) for i, j in pairs])
    c = np.mean([cosine(r, q) for r in rests])
    beta = 1 - 0.3 * ((s + 1) / 2 + (c + 1) / 2) / 2
    a = sum(rests) / count
    if c > 1 / np.sqrt(count):
        a = c**beta * np.mean([np.linalg.norm(r) for r in rests]) * q
    agreement = np.mean([max(0, cosine(heads[i], heads[j])) for i, j in pairs])
    mean = sum(heads) / count
    expected = base + a + 0.2 * agreement * np.linalg.norm(a) * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(run(resmerge, base, experts, **F64), expected, atol=1e-9)


def wudi_loss(d, vectors):
    return sum((((d - x) @ x.T) ** 2).sum() / (x**2).sum() for x in vectors)


@SHAPED
def test_wudi_follows_adam_down_the_interference(shape, models, run):
    """Gradients by finite differences, moments written out."""
    base, experts = models(shape=shape)
    vectors = [e - base for e in experts]
    d, m, v = sum(vectors), 0, 0
    for step in range(1, 4):
        gradient = np.zeros_like(d)
        for index in np.ndindex(*d.shape):
            h = np.zeros_like(d)
            h[index] = 1e-3  # exact for a quadratic loss
            gradient[index] = (wudi_loss(d + h, vectors) - wudi_loss(d - h, vectors)) / 2e-3
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        d = d - 0.02 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(run(wudi, base, experts, iters=3, lr=0.02, **F64), base + d, atol=1e-7)


@SHAPED
def test_wudi_reaches_the_minimum(shape, models, run):
    base, experts = models(shape=shape, count=2)
    vectors = [e - base for e in experts]
    grams = [x.T @ x / (x**2).sum() for x in vectors]
    least = sum(x @ g for x, g in zip(vectors, grams, strict=True)) @ np.linalg.pinv(sum(grams))
    found = run(wudi, base, experts, iters=3000, lr=1e-3, **F64) - base
    assert wudi_loss(found, vectors) <= wudi_loss(least, vectors) + 0.02 * wudi_loss(sum(vectors), vectors)


@pytest.mark.parametrize("function", [iso_cts, knots_ties, rewiring, resmerge, wudi])
@SHAPED
def test_identities(function, shape, models, run):
    base, experts = models(shape=shape)
    np.testing.assert_allclose(run(function, base, experts, scale=0.0, **F64), base, atol=1e-12)
    np.testing.assert_allclose(run(function, base, [base, base], **F64), base, atol=1e-12)
    again = run(function, base, experts[::-1], **F64)
    np.testing.assert_allclose(run(function, base, experts, **F64), again, atol=1e-9)
    full = {
        knots_ties: {"density": 1.0},
        rewiring: {"delta_fraction": 1.0, "svd_rank": 99},
        wudi: {"iters": 0},
    }.get(function)
    if full is not None and (function is not rewiring or shape[0] == shape[1]):
        np.testing.assert_allclose(run(function, base, experts[:1], **full, **F64), experts[0], atol=1e-9)
        alike = {} if function is knots_ties else {"scale": 1 / 3}
        np.testing.assert_allclose(run(function, base, experts[:1] * 3, **full, **alike, **F64), experts[0], atol=1e-9)
