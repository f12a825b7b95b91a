"""ISO-Merger against numpy, its closed form at first order, and the spectrum that it must keep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError
from rotrl.linalg.rotation import exp
from rotrl.merge import iso_merger as iso
from rotrl.merge.iso_merger import coefficients, iso_merger

SEEDS = st.integers(0, 10**6)
SHAPES = [(6, 6), (4, 9), (9, 5)]
SHAPED = pytest.mark.parametrize("shape", SHAPES)
F64 = {"dtype": torch.float64}


def gapped(seed, shape, count=2, size=1e-3):
    """A base whose singular values are 1 apart, so that frames are well defined."""
    rng = np.random.default_rng(seed)
    u, _, vh = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    base = u @ np.diag(np.arange(len(vh), 0, -1.0)) @ vh
    return base, [base + size * rng.standard_normal(shape) for _ in range(count)]


def polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def project(x, y):
    return y - x @ (x.T @ y + y.T @ x) / 2


def oracle(base, experts, keep, ridge, c_max, reproject):
    u0, s0, vh0 = np.linalg.svd(base, full_matrices=False)
    cut = round(keep * len(s0))
    moves = []
    for expert in experts:
        u, _, vh = np.linalg.svd(expert, full_matrices=False)
        for k in range(len(s0)):
            if u0[:, k] @ u[:, k] < 0:
                u[:, k], vh[k] = -u[:, k], -vh[k]
        a, b = project(u0, u - u0), project(vh0.T, vh.T - vh0.T)
        a[:, cut:] = b[:, cut:] = 0
        moves.append((project(u0, a), project(vh0.T, b)) if reproject else (a, b))
    g = [a @ np.diag(s0) @ vh0 + u0 @ np.diag(s0) @ b.T for a, b in moves]
    gram = np.array([[(x * y).sum() for y in g] for x in g])
    c = np.clip(np.linalg.solve(gram + ridge * np.eye(len(g)), np.diag(gram)), 0, c_max)
    a, b = (sum(x * move[i] for x, move in zip(c, moves, strict=True)) for i in range(2))
    return polar(u0 + project(u0, a)) @ np.diag(s0) @ polar(vh0.T + project(vh0.T, b)).T


@SHAPED
@pytest.mark.parametrize("reproject", [True, False])
@given(seed=SEEDS, keep=st.floats(0, 1), count=st.integers(1, 3))
def test_oracle(shape, reproject, seed, keep, count, run):
    base, experts = gapped(seed, shape, count, size=0.02)
    expected = oracle(base, experts, keep, 1e-8, 1.5, reproject)
    actual = run(iso_merger, base, experts, keep=keep, ridge=1e-8, reproject=reproject, **F64)
    np.testing.assert_allclose(actual, expected, atol=1e-8)


@SHAPED
@pytest.mark.parametrize("reproject", [True, False])
@given(seed=SEEDS)
def test_singular_values_of_the_base_stay(shape, reproject, seed, models, run):
    base, experts = models(seed, shape=shape)
    merged = run(iso_merger, base, experts, reproject=reproject, **F64)
    values = [np.linalg.svd(w, compute_uv=False) for w in (merged, base)]
    np.testing.assert_allclose(*values, atol=1e-10)


@SHAPED
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 1.0])
def test_closed_form_at_first_order(shape, keep, run):
    """Slope 2 of the difference over the size of the update."""

    def difference(h):
        base, experts = gapped(1, shape, size=h)
        exact, first = (run(iso_merger, base, experts, keep=keep, solver=s, **F64) for s in ("svd", "first_order"))
        return np.linalg.norm(exact - first)

    assert difference(1e-4) < 1e-5
    if keep > 0:
        assert math.log10(difference(1e-3) / difference(1e-4)) == pytest.approx(2, abs=0.1)


@SHAPED
@pytest.mark.parametrize("solver", ["svd", "first_order"])
def test_identities(shape, solver, run):
    base, experts = gapped(0, shape, count=3)
    hyper = {"solver": solver, "ridge": 1e-14, **F64}
    np.testing.assert_allclose(run(iso_merger, base, [base, base], **hyper), base, atol=1e-10)
    np.testing.assert_allclose(run(iso_merger, base, experts, c_max=0.0, **hyper), base, atol=1e-10)
    once, thrice = (run(iso_merger, base, experts[:1] * count, **hyper) for count in (1, 3))
    np.testing.assert_allclose(once, thrice, atol=1e-9)
    again = run(iso_merger, base, experts[::-1], **hyper)
    np.testing.assert_allclose(run(iso_merger, base, experts, **hyper), again, atol=1e-9)


@SHAPED
def test_one_rotated_expert_is_that_expert_to_second_order(shape, run):
    """Both sides turned, nothing cut: the expert's spectrum is the base's, c is 1."""
    base, _ = gapped(0, shape)
    rng = np.random.default_rng(5)
    skew = [rng.standard_normal((n, n)) for n in shape]

    def difference(h):
        left, right = (exp(torch.tensor(h * (a - a.T))).numpy() for a in skew)
        expert = left @ base @ right
        return np.linalg.norm(run(iso_merger, base, [expert], keep=1.0, **F64) - expert)

    assert difference(1e-4) < 1e-5
    assert math.log10(difference(1e-3) / difference(1e-4)) > 1.9


@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32)])
def test_published_coefficients_scatter_and_repaired_ones_do_not(shape, monkeypatch):
    """Updates that are orthogonal as tangent vectors have c = 1, but for what cutting without projecting adds."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(6):
        base, experts = gapped(seed, shape, size=1e-4)
        for reproject, all_of_them in found.items():

            def spied(*args, into=all_of_them):
                into += (c := coefficients(*args))
                return c

            monkeypatch.setattr(iso, "coefficients", spied)
            iso_merger(torch.tensor(base), [torch.tensor(e) for e in experts], reproject=reproject)
    repaired, published = (np.array(found[reproject]) for reproject in (True, False))
    np.testing.assert_allclose(repaired, 1, atol=0.1)
    assert np.abs(published - 1).mean() > np.abs(repaired - 1).mean()


def test_coefficients_share_what_is_common_and_are_clipped():
    x, y = torch.eye(2).double()
    for moves, expected in (([x, y], [1, 1]), ([x, x], [0.5, 0.5]), ([x, 0.1 * y - 0.9 * x], [1.5, 1.5])):
        both = torch.stack(moves)
        assert coefficients(both @ both.mT, 0.0, 1.5) == pytest.approx(expected)


def test_first_order_needs_no_gaps(run):
    """Equal singular values: the experts' frames are arbitrary there, and their means lose most of the update."""
    rng = np.random.default_rng(0)
    base = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    experts = [base + 1e-4 * rng.standard_normal((24, 24)) for _ in range(2)]
    update, hyper = np.linalg.norm(experts[0] - base), {"keep": 1.0, **F64}
    by_frames, at_first_order = (
        np.linalg.norm(run(iso_merger, base, experts, solver=s, **hyper) - base) / update
        for s in ("svd", "first_order")
    )
    assert at_first_order == pytest.approx(2**0.5, rel=0.1)
    assert by_frames < 0.6


def test_published_form_has_no_fast_path(run):
    base, experts = gapped(0, (4, 4))
    with pytest.raises(ConfigError, match="solver=first_order has no published form"):
        run(iso_merger, base, experts, solver="first_order", reproject=False)


def test_vectors_go_by_the_mean(method):
    from rotrl.checkpoint.layout import Role

    base = torch.zeros(4)
    merged = method("iso_merger")("x", Role(0, "norm"), base, [base + 1, base + 3])
    assert torch.equal(merged, torch.full((4,), 2.0))
