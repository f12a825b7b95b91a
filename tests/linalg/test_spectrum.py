"""Spectral metrics against closed forms, dense formulas and Monte Carlo in the full bases."""

import pytest
import torch

from rotrl.linalg.spectrum import (
    along_base,
    basis,
    coordinates,
    gram_basis,
    gram_drift,
    leading_angles,
    moved,
    nss,
    nu,
    principal_angles,
    rho,
)
from rotrl.linalg.tangent import tangency, tangent_part, tangent_projection

SHAPES = [(6, 6), (4, 9), (9, 4)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, angle, seed=1):
    A = random(d, d, seed=seed)
    A = A - A.mT
    return torch.matrix_exp(angle * A / torch.linalg.matrix_norm(A))


def spectra(W0, D):
    return torch.linalg.svdvals(W0), torch.linalg.svdvals(W0 + D)


@pytest.mark.parametrize("shape", SHAPES)
def test_basis_and_coordinates_hold_the_whole_update(shape):
    W0, D = random(*shape), random(*shape, seed=1)
    U, s, V = basis(W0)
    assert torch.allclose(U @ torch.diag(s) @ V.mT, W0)
    c = coordinates(W0, D)
    assert torch.allclose(c.T.square().sum() + c.below.sum() + c.beside.sum(), c.energy)
    Ufull, _, Vfull = torch.linalg.svd(W0, full_matrices=True)
    T = (Ufull.mT @ D @ Vfull.mT).square()
    r = min(shape)
    assert torch.allclose(c.T.square(), T[:r, :r])
    assert torch.allclose(c.below, T[r:, :r].sum(0))
    assert torch.allclose(c.beside, T[:r, r:].sum(1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tangent_part_is_the_projection_in_coordinates(shape, side):
    W0, D = random(*shape), random(*shape, seed=1)
    part, projected = tangent_part(coordinates(W0, D), side=side), coordinates(W0, tangent_projection(W0, D, side=side))
    for got, expected in zip(part[:5], projected[:5], strict=True):
        assert torch.allclose(got, expected, atol=1e-9)


def test_rank_is_cut_at_float64_rounding():
    W0 = random(6, 2) @ random(2, 5, seed=1)
    assert (basis(W0).s > 0).sum() == 2
    assert (basis(torch.zeros(3, 4)).s == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_finite_rotations_keep_spectrum_gram_and_norm(shape, side):
    W0 = random(*shape)
    D = rotation(shape[0], 0.3) @ W0 - W0 if side == "left" else W0 @ rotation(shape[1], 0.3) - W0
    before, after = spectra(W0, D)
    c = coordinates(W0, D)
    assert nu(after, c) < 1e-12
    assert nss(before, after) < 1e-12
    assert rho(c) == pytest.approx(1)
    assert gram_drift(c, side=side) < 1e-12
    other = "right" if side == "left" else "left"
    assert gram_drift(c, side=other) > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_multiple_of_the_base_explains_is_its_regression(shape):
    W0, D = random(*shape), random(*shape, seed=1) - 0.3 * random(*shape)
    slope = float((W0 * D).sum() / W0.square().sum())
    explained = 1 - (D - slope * W0).square().sum() / D.square().sum()
    assert torch.allclose(along_base(coordinates(W0, D)), explained)
    assert along_base(coordinates(W0, -0.01 * W0)) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(40, 40), (30, 60), (60, 30)])
def test_small_noise_has_nu_and_gram_of_one_and_rho_of_zero(shape):
    W0 = random(*shape)
    noise = 1e-4 * random(200, *shape, seed=1)
    _, after = spectra(W0, noise)
    assert nu(after, coordinates(W0, noise)).square().mean() == pytest.approx(1, abs=0.05)
    assert abs((noise * W0).sum((-2, -1)).mean()) < 4 * 1e-4 * torch.linalg.matrix_norm(W0) / 200**0.5
    for side in ("left", "right"):
        assert gram_drift(coordinates(W0, noise), side=side).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("shape", "tolerance"), [((6, 6), 0.01), ((4, 9), 0.03), ((9, 4), 0.03)])
def test_gram_drift_is_relative_to_its_mean_over_sign_flips(shape, tolerance, side):
    """D as large as W0, so that the second-order terms count."""
    W0, D = random(*shape), random(*shape, seed=1)
    U, _, Vh = torch.linalg.svd(W0, full_matrices=True)
    signs = torch.randint(0, 2, (20000, *shape), generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    W1 = W0 + U @ (signs * (U.T @ D @ Vh.T)) @ Vh

    def drift(W):
        return (W.mT @ W - W0.mT @ W0 if side == "left" else W @ W.mT - W0 @ W0.mT).square().sum((-2, -1))

    expected = drift(W0 + D) / drift(W1).mean()
    assert gram_drift(coordinates(W0, D), side=side) == pytest.approx(expected.item(), rel=tolerance)


def test_principal_angles_of_planted_planes_at_every_size():
    planted = torch.tensor([1e-9, 1e-4, 0.5, 1.2, 1.5707], dtype=torch.float64)
    k = len(planted)
    frame = torch.linalg.qr(random(12, 2 * k)).Q
    X = frame[:, :k]
    Y = X * planted.cos() + frame[:, k:] * planted.sin()
    mixed = Y @ torch.linalg.qr(random(k, k, seed=2)).Q
    assert torch.allclose(principal_angles(X, mixed), planted, rtol=1e-6, atol=1e-12)
    assert principal_angles(X, X).max() < 1e-14


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("angle", [1e-7, 1e-3, 0.8, 3.0])
def test_leading_angles_are_the_principal_angles_to_the_first_units(angle, k):
    Y = rotation(7, angle)[:, :k]
    units = torch.eye(7, k, dtype=torch.float64)
    expected = principal_angles(units, Y)
    assert torch.allclose(leading_angles(Y), expected, rtol=0, atol=2e-8 * max(1.0, float(expected.max())))
    assert torch.equal(leading_angles(torch.stack([units, Y]))[1], leading_angles(Y))


@pytest.mark.parametrize("kind", ["generic", "graded", "deficient"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_by_the_gram_matrix_is_that_of_the_svd(shape, kind):
    """What a GPU computes, in batches: orthonormal at any rank, exact where the spectrum spans four decades."""
    U, s, Vh = torch.linalg.svd(random(2, *shape), full_matrices=False)
    if kind != "generic":
        s = torch.logspace(0, -4, s.shape[-1], dtype=torch.float64).expand_as(s).clone()
    if kind == "deficient":
        s[..., -2:] = 0.0
    W0 = U * s.unsqueeze(-2) @ Vh
    found, expected, r = gram_basis(W0), basis(W0), s.shape[-1]
    for axes in (found.U, found.V):
        assert torch.allclose(axes.mT @ axes, torch.eye(r).double().expand(2, r, r), atol=1e-12)
    assert torch.allclose(found.U * found.s.unsqueeze(-2) @ found.V.mT, W0, atol=1e-11)
    assert torch.allclose(found.s, expected.s, rtol=1e-7, atol=1e-11)
    shares = [tangency(coordinates(frame, random(*shape, seed=1)), side="left").share for frame in (found, expected)]
    assert torch.allclose(*shares, rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_moved_base_by_its_coordinates_is_its_svd(shape, scale):
    W0, D, k = random(*shape), scale * random(*shape, seed=1), 2
    frame, after = basis(W0), basis(W0 + D)
    found = moved(coordinates(frame, D), k)
    assert torch.allclose(found.s, after.s, rtol=1e-12, atol=1e-13)
    for before, turned, got in ((frame.U, after.U, found.left), (frame.V, after.V, found.right)):
        expected = principal_angles(before[:, :k], turned[:, :k])
        assert torch.allclose(got.mT @ got, torch.eye(k).double(), atol=1e-12)
        angles = principal_angles(torch.eye(len(got), k, dtype=torch.float64), got)
        assert torch.allclose(angles, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_keeps_the_shift_of_the_spectrum(shape):
    """s and T come from one basis, so that what float32 loses of the base is not taken for a change."""
    W0, D = random(*shape), 1e-4 * random(*shape, seed=1)
    c = coordinates(basis(W0, torch.float32), D)
    before, after = spectra(W0, D)
    assert torch.allclose(moved(c, 1).s - c.s, after - before, rtol=1e-3, atol=1e-7)
