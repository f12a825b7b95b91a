"""DARE, DELLA and Breadcrumbs against numpy, entry by entry or with masks counted from first principles."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError
from rotrl.merge.sparse import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    della,
    della_linear,
    keep_probability,
    largest,
)

SEEDS = st.integers(0, 10**6)
WEIGHTS = st.lists(st.floats(0.1, 3), min_size=3, max_size=3)


def elect(vectors, weights, normalize):
    """The sign election of TIES, entry by entry."""
    merged = np.zeros_like(vectors[0])
    for index in np.ndindex(*merged.shape):
        entries = [(w, x[index]) for w, x in zip(weights, vectors, strict=True)]
        sign = np.sign(sum(w * x for w, x in entries))
        kept = [(w, x) for w, x in entries if x * sign > 0]
        if kept:
            merged[index] = sum(w * x for w, x in kept) / (sum(w for w, _ in kept) if normalize else 1)
    return merged


def uniform(seed, base, count):
    generator = np.random.SFC64(seed)
    words = [generator.random_raw(-(-base.size // 2)).view(np.int32)[: base.size] for _ in range(count)]
    return [(word / 2**32 + 0.5).reshape(base.shape) for word in words]


@given(seed=SEEDS, density=st.floats(0.1, 1), rescale=st.booleans(), weights=WEIGHTS, scale=st.floats(0, 2))
def test_dare_linear(seed, density, rescale, weights, scale, models, run, close):
    base, experts = models(seed)
    total = sum(
        w * (e - base) * (u < density) / (density if rescale else 1)
        for w, e, u in zip(weights, experts, uniform(seed, base, 3), strict=True)
    )
    hyper = {"density": density, "rescale": rescale, "weights": weights, "scale": scale, "seed": seed}
    close(run(dare_linear, base, experts, **hyper), base + scale * total)


def oracle_probability(d, density, epsilon):
    p = np.zeros_like(d)
    for row, target in zip(np.atleast_2d(d), np.atleast_2d(p), strict=True):
        for rank, column in enumerate(np.argsort(np.abs(row), kind="stable")):
            target[column] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return p


@pytest.mark.parametrize("shape", [(4, 6), (9,)])
@given(seed=SEEDS, density=st.floats(0.4, 0.6), epsilon=st.floats(0, 0.39), weights=WEIGHTS, rescale=st.booleans())
def test_della(shape, seed, density, epsilon, weights, rescale, models, run, close):
    base, experts = models(seed, shape=shape)
    dropped = []
    for expert, u in zip(experts, uniform(seed, base, 3), strict=True):
        p = oracle_probability(expert - base, density, epsilon)
        dropped.append((expert - base) * (u < p) / (p if rescale else 1))
    hyper = {"density": density, "epsilon": epsilon, "weights": weights, "rescale": rescale, "seed": seed}
    linear = base + sum(w * d for w, d in zip(weights, dropped, strict=True))
    close(run(della_linear, base, experts, **hyper), linear)
    for normalize in (True, False):
        expected = base + 0.5 * elect(dropped, weights, normalize)
        close(run(della, base, experts, **hyper, normalize=normalize, scale=0.5), expected)


def test_dare_keeps_the_share_and_the_mean():
    d = torch.ones(300, 300)
    for density in (0.1, 0.5, 0.9):
        merged = dare_linear(torch.zeros(300, 300), [d, d], density=density, seed=3, scale=0.5)
        masks = [dare_linear(torch.zeros(300, 300), [w, 0 * d], density=density, seed=3) != 0 for w in (d,)]
        assert masks[0].float().mean() == pytest.approx(density, abs=0.006)
        assert merged.mean() == pytest.approx(1, abs=0.02)
        both = (merged > 0.9 / density).float().mean()
        assert both == pytest.approx(density**2, abs=0.006)  # the experts' masks are independent


def test_della_keeps_the_mean_and_prefers_the_large():
    d = torch.arange(1.0, 401).repeat(400, 1)
    merged = della_linear(torch.zeros(400, 400), [d], density=0.5, epsilon=0.4)
    assert merged.mean() == pytest.approx(d.mean().item(), rel=0.02)
    kept = (merged != 0).float().mean(0)
    assert kept[:100].mean() == pytest.approx(0.2, abs=0.02)
    assert kept[-100:].mean() == pytest.approx(0.8, abs=0.02)


def test_della_needs_room_around_the_density():
    assert (keep_probability(torch.randn(3, 4), 1.0, 0.15) == 1).all()
    for density, epsilon in ((0.1, 0.15), (0.9, 0.15)):
        with pytest.raises(ConfigError, match=r"merge\.density=.* merge\.epsilon=0\.15"):
            keep_probability(torch.randn(3, 4), density, epsilon)


def oracle_breadcrumbs(d, density, gamma):
    n = d.size
    keep = max(1, round(density * n))
    top = min(round(gamma * n), n - keep)
    order = np.argsort(-np.abs(d), axis=None)
    kept = np.zeros(n)
    kept[order[top : top + keep]] = d.ravel()[order[top : top + keep]]
    return kept.reshape(d.shape)


@given(seed=SEEDS, density=st.floats(0.05, 1), gamma=st.floats(0, 0.4), weights=WEIGHTS, normalize=st.booleans())
def test_breadcrumbs(seed, density, gamma, weights, normalize, models, run, close):
    base, experts = models(seed)
    kept = [oracle_breadcrumbs(e - base, density, gamma) for e in experts]
    hyper = {"density": density, "gamma": gamma, "weights": weights, "scale": 0.7}
    total = sum(w * d for w, d in zip(weights, kept, strict=True))
    close(run(breadcrumbs, base, experts, **hyper), base + 0.7 * total)
    elected = base + 0.7 * elect(kept, weights, normalize)
    close(run(breadcrumbs_ties, base, experts, **hyper, normalize=normalize), elected)


def test_breadcrumbs_drops_outliers_and_tail():
    d = torch.tensor([5.0, -4, 3, 2, -1])
    zero = torch.zeros(5)
    assert breadcrumbs(zero, [d], density=0.6, gamma=0.2).tolist() == [0, -4, 3, 2, 0]
    # Of two outliers one goes, so that four entries remain.
    assert breadcrumbs(zero, [d], density=0.8, gamma=0.4).tolist() == [0, -4, 3, 2, -1]
    assert largest(torch.ones(5), 2).all()


FULL = {
    dare_linear: {"density": 1.0},
    della: {"density": 1.0},
    della_linear: {"density": 1.0},
    breadcrumbs: {"density": 1.0},
    breadcrumbs_ties: {"density": 1.0},
}


@pytest.mark.parametrize("function", FULL)
@given(seed=SEEDS)
def test_identities(function, seed, models, run, close):
    base, experts = models(seed)
    alike = {"scale": 1.0} if function is della else {"scale": 1 / 3}
    close(run(function, base, experts[:1] * 3, **FULL[function], **alike), experts[0])
    close(run(function, base, experts[:1], **FULL[function]), experts[0])
    assert np.array_equal(run(function, base, experts, scale=0.0), base)
    close(run(function, base, experts, **FULL[function]), run(function, base, experts[::-1], **FULL[function]))
