"""Consensus, SCE, RAM, MagMax and Arcee fusion against slow numpy; their identities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.merge.select import arcee_fusion, consensus, magmax, ram, ram_plus, sce
from rotrl.merge.statistics import Overlap

SEEDS = st.integers(0, 10**6)
WEIGHTS = st.lists(st.floats(0.1, 3), min_size=3, max_size=3)


@given(seed=SEEDS, k=st.integers(1, 3), lam=st.floats(0, 2), weights=WEIGHTS)
def test_consensus(seed, k, lam, weights, models, run, close):
    base, experts = models(seed)
    d = [e - base for e in experts]
    expected = base.copy()
    for index in np.ndindex(*base.shape):
        others = [abs(sum(y[index] for y in d) - x[index]) for x in d]
        if sum(abs(x[index]) > lam * other for x, other in zip(d, others, strict=True)) >= k:
            expected[index] += 0.5 * sum(w * x[index] for w, x in zip(weights, d, strict=True))
    close(run(consensus, base, experts, k=k, lam=lam, weights=weights, scale=0.5), expected)


@given(seed=SEEDS, topk=st.floats(0.05, 1))
def test_sce(seed, topk, models, run, close):
    base, experts = models(seed)
    d = np.array([e - base for e in experts])
    variance = d.var(axis=0)
    if topk < 1:
        chosen = np.argsort(-variance, axis=None)[: round(topk * np.count_nonzero(variance))]
        mask = np.zeros(variance.size)
        mask[chosen] = 1
        d = d * mask.reshape(variance.shape)
    energy = (d**2).sum(axis=(1, 2))
    energy = energy / energy.sum() if energy.sum() else np.ones(3) / 3
    expected = base.copy()
    for index in np.ndindex(*base.shape):
        entries = d[(slice(None), *index)]
        agreeing = entries * entries.sum() > 0
        if agreeing.any():
            expected[index] += 0.8 * (energy * entries)[agreeing].sum() / energy[agreeing].sum()
    close(run(sce, base, experts, select_topk=topk, scale=0.8), expected)


def sparse_models(seed, models):
    """Experts that change about half of the entries, some of them by less than the threshold."""
    base, experts = models(seed)
    rng = np.random.default_rng(seed)
    sizes = [rng.choice([0.0, 1e-2, 1.0], base.shape) for _ in experts]
    changed = [base + size * (e - base) for e, size in zip(experts, sizes, strict=True)]
    return base, [expert.astype(np.float32).astype(float) for expert in changed]


def oracle_ram(base, experts, threshold, factors):
    merged = base.copy()
    for index in np.ndindex(*base.shape):
        active = [i for i, e in enumerate(experts) if abs(e[index] - base[index]) > threshold]
        for i in active:
            merged[index] += (factors[i] if len(active) == 1 else 1 / len(active)) * (experts[i] - base)[index]
    return merged


@given(seed=SEEDS)
def test_ram(seed, models, run, close):
    base, experts = sparse_models(seed, models)
    close(run(ram, base, experts, threshold=1e-2), oracle_ram(base, experts, 1e-2, [1, 1, 1]))


def test_relative_threshold_follows_the_size_of_the_update(models, run):
    base, experts = models()
    base = np.zeros_like(base)
    merged = run(ram, base, experts, threshold=1.0, relative=True)
    np.testing.assert_allclose(run(ram, base, [1e-6 * e for e in experts], threshold=1.0, relative=True), 1e-6 * merged)
    assert (run(ram, base, [1e-6 * e for e in experts]) == 0).all()


@given(seed=SEEDS, rescale=st.floats(1, 2))
def test_ram_plus_scales_by_the_overlap_of_the_whole_model(seed, rescale, models, run, close):
    tensors = [sparse_models(seed + i, models) for i in range(3)]
    overlap = Overlap(1e-2, relative=False)
    unique, shared = np.zeros(3), np.zeros(3)
    for base, experts in tensors:
        overlap.add([(torch.tensor(base).float(), [torch.tensor(e).float() for e in experts])])
        masks = np.array([abs(e - base) > 1e-2 for e in experts])
        unique += (masks & (masks.sum(0) == 1)).sum(axis=(1, 2))
        shared += (masks & (masks.sum(0) > 1)).sum(axis=(1, 2))
    assert (overlap.unique, overlap.shared) == (unique.tolist(), shared.tolist())
    factors = 1 + (rescale - 1) * np.minimum(1, shared / unique)
    for base, experts in tensors:
        actual = run(ram_plus, base, experts, statistics=overlap, threshold=1e-2, rescale=rescale)
        close(actual, oracle_ram(base, experts, 1e-2, factors))


def test_overlap_without_unique_entries():
    overlap = Overlap(0.0, relative=False)
    overlap.add([(torch.zeros(3), [torch.ones(3), torch.ones(3), torch.zeros(3)])])
    assert overlap.ratios() == [1.0, 1.0, 0.0]


@given(seed=SEEDS)
def test_magmax(seed, models, run, close):
    base, experts = models(seed)
    d = np.array([e - base for e in experts])
    expected = base + 0.5 * np.take_along_axis(d, np.abs(d).argmax(axis=0)[None], axis=0)[0]
    close(run(magmax, base, experts, scale=0.5), expected)


def test_magmax_of_equal_magnitudes_is_their_mean(run):
    assert run(magmax, np.zeros((1, 2)), [np.array([[1.0, 2]]), np.array([[-1.0, 2]])]).tolist() == [[0, 2]]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(6, 9), (40,)])
@given(seed=SEEDS, weights=WEIGHTS)
def test_arcee_fusion(shape, seed, weights, models, run, close):
    base, experts = models(seed, shape=shape)
    expected = base.copy()
    for w, expert in zip(weights, experts, strict=True):
        p, q = softmax(expert) + 1e-8, softmax(base) + 1e-8
        importance = abs(expert - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
        ordered = np.sort(importance, axis=None)
        q1, median, q3 = (ordered[int(part * (ordered.size - 1))] for part in (0.25, 0.5, 0.75))
        expected += w * (expert - base) * (importance >= median + 1.5 * (q3 - q1))
    close(run(arcee_fusion, base, experts, weights=weights), expected)


@pytest.mark.parametrize("function", [consensus, sce, ram, magmax, arcee_fusion])
@given(seed=SEEDS)
def test_identities(function, seed, models, run, close):
    base, experts = models(seed)
    assert np.array_equal(run(function, base, experts, scale=0.0), base)
    close(run(function, base, experts), run(function, base, experts[::-1]))
    assert np.array_equal(run(function, base, [base, base]), base)
    if function is not arcee_fusion:  # which keeps but outstanding entries
        close(run(function, base, experts[:1]), experts[0])
        alike = {"scale": 1 / 3} if function is consensus else {}
        close(run(function, base, experts[:1] * 3, **alike), experts[0])
