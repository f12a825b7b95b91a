"""Shares and projections against least squares on explicit generators, nulls against Monte Carlo."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotrl.linalg.spectrum import basis, coordinates
from rotrl.linalg.tangent import generator, kappa, null_share, tangency, tangent_projection, tangent_share

SHAPES = [(5, 5), (4, 7), (7, 4), (1, 6), (6, 1)]
SIDES = ["left", "right", "both"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew_basis(d):
    for i, j in combinations(range(d), 2):
        E = torch.zeros(d, d, dtype=torch.float64)
        E[i, j], E[j, i] = 1.0, -1.0
        yield E


def tangent_vectors(W0, side):
    m, n = W0.shape
    left = [E @ W0 for E in skew_basis(m)] if side != "right" else []
    right = [W0 @ E for E in skew_basis(n)] if side != "left" else []
    vectors = [v.flatten() for v in left + right]
    return torch.stack(vectors, 1) if vectors else torch.zeros(m * n, 1, dtype=torch.float64)


def brute_projection(W0, D, side):
    U, s, _ = torch.linalg.svd(tangent_vectors(W0, side), full_matrices=False)
    U = U[:, s > 1e-10 * max(float(s.max()), 1e-300)]
    return (U @ (U.T @ D.flatten())).reshape(D.shape)


def special(kind, m, n):
    """Bases with the awkward spectra: equal, nearly equal and vanishing singular values."""
    U, s, Vh = torch.linalg.svd(random(m, n, seed=3), full_matrices=False)
    if kind == "equal":
        s = torch.ones_like(s)
    elif kind == "pair":
        s[: min(2, len(s))] = s[0]
    elif kind == "deficient":
        s[len(s) // 2 :] = 0.0
    elif kind == "zero":
        s = torch.zeros_like(s)
    return U @ torch.diag(s) @ Vh


@pytest.mark.parametrize("kind", ["generic", "equal", "pair", "deficient", "zero"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_and_share_are_least_squares(shape, side, kind):
    W0, D = special(kind, *shape), random(*shape, seed=1)
    truth = brute_projection(W0, D, side)
    assert torch.allclose(tangent_projection(W0, D, side=side), truth, atol=1e-10)
    assert torch.allclose(tangent_share(W0, D, side=side), truth.square().sum() / D.square().sum(), atol=1e-10)


@pytest.mark.parametrize("kind", ["generic", "equal", "deficient", "zero"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_generator_is_the_skew_least_norm_solution(shape, side, kind):
    W0, D = special(kind, *shape), random(*shape, seed=1)
    A = generator(W0, D, side=side)
    d = shape[0] if side == "left" else shape[1]
    assert torch.allclose(A, -A.mT, atol=1e-12)
    moved = A @ W0 if side == "left" else W0 @ A
    assert torch.allclose(moved, tangent_projection(W0, D, side=side), atol=1e-10)
    if d > 1:
        solution = torch.linalg.pinv(tangent_vectors(W0, side), rtol=1e-10) @ D.flatten()
        assert torch.allclose(A, sum(x * E for x, E in zip(solution, skew_basis(d), strict=True)), atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_null_and_spread_agree_with_sign_flips_in_the_full_basis(shape, side):
    W0, D = random(*shape), random(*shape, seed=1)
    U, _, Vh = torch.linalg.svd(W0, full_matrices=True)
    signs = torch.randint(0, 2, (20000, *shape), generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    flipped = U @ (signs * (U.T @ D @ Vh.T)) @ Vh
    shares = tangent_share(basis(W0), flipped, side=side)
    result = tangency(coordinates(W0, D), side=side)
    assert abs(shares.mean() - result.null) < 4 * result.spread / 20000**0.5
    assert abs(shares.std() / result.spread - 1) < 0.03
    assert torch.allclose(null_share(W0, flipped[0], side=side), result.null)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5)])
def test_kappa_of_noise_rotation_and_stretch(shape, side):
    W0 = random(*shape)
    frame = basis(W0)
    noise = random(400, *shape, seed=1)
    z = kappa(frame, noise, side=side) / tangency(coordinates(frame, noise), side=side).kappa_spread
    assert abs(z.mean()) < 4 / 20
    assert abs(z.std() - 1) < 0.15

    A = random(*(2 * [shape[0] if side == "left" else shape[1]]), seed=2)
    A = A - A.mT
    assert torch.allclose(kappa(W0, A @ W0 if side == "left" else W0 @ A, side=side), torch.ones(()).double())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12)])
def test_stretch_has_kappa_of_about_minus_one(shape, side):
    U, s, Vh = torch.linalg.svd(random(*shape), full_matrices=False)
    W0 = U @ torch.diag(torch.linspace(1.2, 0.8, len(s)).double()) @ Vh
    H = random(len(s), len(s), seed=1)
    H = H + H.mT - 2 * torch.diag(H.diagonal())
    D = U @ H @ U.mT @ W0 if side == "left" else W0 @ Vh.mT @ H @ Vh
    assert kappa(W0, D, side=side) == pytest.approx(-1, abs=0.2)
    assert kappa(U @ Vh, D, side=side) < -0.7


def test_stretch_of_an_orthogonal_base_has_kappa_of_exactly_minus_one():
    H = random(30, 30, seed=1)
    H = H + H.mT - 2 * torch.diag(H.diagonal())
    frame = basis(torch.eye(30, dtype=torch.float64))
    assert tangent_share(frame, H, side="left").abs() < 1e-12
    assert kappa(frame, H, side="left") == pytest.approx(-1)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 7), n=st.integers(2, 7), seed=st.integers(0, 1000), side=st.sampled_from(SIDES))
def test_everything_is_invariant_under_rotations_of_both_spaces(m, n, seed, side):
    W0, D = random(m, n, seed=seed), random(m, n, seed=seed + 1)
    P, Q = torch.linalg.qr(random(m, m, seed=seed + 2)).Q, torch.linalg.qr(random(n, n, seed=seed + 3)).Q
    before, after = (tangency(coordinates(*pair), side=side) for pair in ((W0, D), (P @ W0 @ Q.T, P @ D @ Q.T)))
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(old, new, atol=1e-9)
    turned = tangent_projection(P @ W0 @ Q.T, P @ D @ Q.T, side=side)
    assert torch.allclose(turned, P @ tangent_projection(W0, D, side=side) @ Q.T, atol=1e-9)


@pytest.mark.parametrize("kind", ["generic", "pair", "deficient"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_exceed_their_nulls_by_the_same_amount(shape, kind):
    c = coordinates(special(kind, *shape), random(*shape, seed=1))
    left, right = (tangency(c, side=side) for side in ("left", "right"))
    assert torch.allclose(left.share - left.null, right.share - right.null, atol=1e-12)


def expected_share(m, n, side):
    if side == "both":
        return 1 - 1 / max(m, n)
    if side == "right":
        m, n = n, m
    return (m - 1) / (2 * n) if m <= n else 1 - (n + 1) / (2 * m)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3)])
def test_share_of_a_random_update_is_the_dimension_of_the_tangent_space(shape, side):
    """The mean share of isotropic noise is trace(P_T) / mn, taken exactly over the mn unit updates."""
    units = torch.eye(shape[0] * shape[1], dtype=torch.float64).reshape(-1, *shape)
    mean = tangent_share(basis(random(*shape)), units, side=side).mean()
    assert mean == pytest.approx(expected_share(*shape, side), abs=1e-10)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)])
def test_batches_equal_single_matrices_and_float32_is_kept(shape, side):
    W0, D = random(2, 3, *shape), random(2, 3, *shape, seed=1)
    batched = tangency(coordinates(W0, D), side=side)
    projected = tangent_projection(W0, D, side=side)
    for i in range(2):
        for j in range(3):
            single = tangency(coordinates(W0[i, j], D[i, j]), side=side)
            assert all(torch.allclose(b[i, j], s) for b, s in zip(batched, single, strict=True))
            assert torch.allclose(projected[i, j], tangent_projection(W0[i, j], D[i, j], side=side))
    low = tangent_projection(W0.float(), D.float(), side=side)
    assert low.dtype == torch.float32
    assert torch.allclose(low, projected.float(), atol=1e-4)


def test_zero_update_has_no_share():
    assert torch.isnan(tangent_share(random(3, 4), torch.zeros(3, 4), side="left"))
    assert tangent_projection(random(3, 4), torch.zeros(3, 4), side="left").abs().max() == 0
