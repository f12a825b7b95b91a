"""procrustes and polar against the definition: no nearby rotation does better, and scipy agrees."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import NumericsError
from rotrl.linalg.procrustes import polar, procrustes
from rotrl.linalg.rotation import angles, exp, orthogonality_error

SHAPES = [(5, 5), (3, 7), (7, 3), (1, 4), (4, 1)]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def skew(n, seed=0):
    a = normal(n, n, seed=seed)
    return a - a.mT


def misfit(r, source, target, side):
    return ((source @ r if side == "right" else r @ source) - target).norm()


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_is_scipys_and_orthonormal(shape, dtype):
    m = normal(*shape).to(dtype)
    expected, _ = scipy.linalg.polar(m.double().numpy(), side="right" if shape[0] >= shape[1] else "left")
    np.testing.assert_allclose(polar(m), expected, atol=50 * torch.finfo(dtype).eps)
    tall = m if shape[0] >= shape[1] else m.mT
    assert orthogonality_error(polar(tall)) < 20 * torch.finfo(dtype).eps


def test_polar_of_float32_is_orthonormal_to_rounding():
    assert orthogonality_error(polar(normal(300, 300).float()).double()) < 1e-7


@pytest.mark.parametrize("shape", [(12, 12), (20, 12), (12, 20)])
@given(digits=st.floats(0, 6.5), seed=st.integers(0, 999))
def test_polar_of_float32_is_that_of_float64_whatever_the_condition(shape, digits, seed):
    """By the Gram matrix, polished, and by an SVD in float64; one in float32 is off by 1e-7 times the condition."""
    u, _, vh = torch.linalg.svd(normal(*shape, seed=seed), full_matrices=False)
    m = ((u * torch.logspace(0, -digits, 12, dtype=torch.float64)) @ vh).float()
    expected, _ = scipy.linalg.polar(m.double().numpy(), side="right" if shape[0] >= shape[1] else "left")
    assert np.linalg.norm(polar(m).double().numpy() - expected, 2) < 3e-7


def test_polar_of_a_stack_and_without_eigenvectors(monkeypatch):
    stack = normal(3, 6, 4).float()
    found = polar(stack)
    for m, q in zip(stack, found, strict=True):
        torch.testing.assert_close(q, polar(m))
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    torch.testing.assert_close(polar(stack), found)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(NumericsError, match="the singular value decomposition failed"):
        polar(stack)


def failing(*_, **__):
    raise torch.linalg.LinAlgError("linalg: failed to converge")


@pytest.mark.parametrize("side", ["left", "right"])
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
def test_no_nearby_rotation_fits_better(side, shape, seed):
    source, target = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    r = procrustes(source, target, side=side)
    best = misfit(r, source, target, side)
    assert orthogonality_error(r) < 1e-12
    for trial in range(5):
        turned = exp(1e-3 * skew(r.shape[-1], seed=trial)) @ r
        assert misfit(turned, source, target, side) >= best - 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_minimum_is_scipys(side):
    source, target = normal(6, 6), normal(6, 6, seed=1)
    s, t = (source, target) if side == "right" else (source.T, target.T)
    expected, _ = scipy.linalg.orthogonal_procrustes(s.numpy(), t.numpy())
    r = procrustes(source, target, side=side)
    np.testing.assert_allclose(r, expected if side == "right" else expected.T, atol=1e-12)


@given(shape=st.sampled_from(SHAPES), anchor=st.floats(1e-4, 10), seed=st.integers(0, 999))
def test_anchored_form_minimises_the_anchored_objective(shape, anchor, seed):
    source, target = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    n = shape[1]
    mu = anchor * source.square().sum() / min(shape)

    def objective(r):
        return (source @ r - target).square().sum() + mu * (r - torch.eye(n)).square().sum()

    r = procrustes(source, target, side="right", anchor=anchor)
    for trial in range(5):
        assert objective(exp(1e-3 * skew(n, seed=trial)) @ r) >= objective(r) - 1e-9 * (1 + mu)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_matrices_need_no_rotation(side, shape):
    w = normal(*shape)
    r = procrustes(w, w, side=side)
    torch.testing.assert_close(r, torch.eye(len(r), dtype=r.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(3, 7), (2, 9)])
def test_unanchored_wide_form_is_the_limit_of_the_anchored_one(shape):
    """On the null space every rotation fits equally; anchor 0 takes the one nearest to I."""
    source = normal(*shape)
    target = source + 0.1 * normal(*shape, seed=1)
    limit = procrustes(source, target, side="right")
    torch.testing.assert_close(limit, procrustes(source, target, side="right", anchor=1e-7), atol=1e-5, rtol=0)
    assert angles(limit).max() < 0.5


def test_identity_outside_of_both_row_spaces():
    source, target = normal(2, 6), normal(2, 6, seed=1)
    r = procrustes(source, target, side="right")
    outside = torch.linalg.svd(torch.cat([source, target]), full_matrices=True)[2][4:]
    torch.testing.assert_close(outside @ r, outside, atol=1e-12, rtol=0)


@pytest.mark.parametrize("anchor", [0.0, 0.01])
def test_zero_matrices_give_the_identity(anchor):
    zero, other = torch.zeros(3, 5), torch.ones(3, 5)
    for source, target in ((zero, zero), (zero, other), (other, zero)):
        torch.testing.assert_close(procrustes(source, target, side="right", anchor=anchor), torch.eye(5))


def test_batches_and_ranks_mix():
    source = normal(3, 4, 4)
    source[1, :, 0] = 0
    target = source + 0.05 * normal(3, 4, 4, seed=1)
    together = procrustes(source, target, side="left")
    for i in range(3):
        torch.testing.assert_close(together[i], procrustes(source[i], target[i], side="left"))


def test_float32_input_keeps_a_small_update():
    """Solved in float64: float32 S^T T loses the rotation that explains an update of 1e-3 of the norm."""
    w = normal(96, 96).float()
    turned = (w.double() @ exp(1e-3 * skew(96) / 96**0.5)).float()
    exact = procrustes(w.double(), turned.double(), side="right")
    r = procrustes(w, turned, side="right")
    eye = torch.eye(96)
    assert r.dtype == torch.float32
    assert (r - exact).norm() < 1e-3 * (exact - eye).norm()


def test_nan_is_named():
    with pytest.raises(NumericsError, match="NaN"):
        procrustes(torch.full((2, 2), torch.nan), torch.eye(2), side="right")


def test_side_is_checked():
    with pytest.raises(ValueError, match="'both'"):
        procrustes(torch.eye(2), torch.eye(2), side="both")
