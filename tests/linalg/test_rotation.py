"""exp, log, geodesic, angles against scipy and planted angles; small_rotation against Procrustes and least squares."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import NumericsError
from rotrl.linalg.procrustes import polar, procrustes
from rotrl.linalg.rotation import angles, exp, geodesic, log, orthogonality_error, small_rotation

SHAPES = [(5, 5), (3, 7), (7, 3)]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def skew(*shape, seed=0):
    a = normal(*shape, shape[-1], seed=seed)
    return a - a.mT


def planted(turns, seed=0):
    """Rotation of 2 len(turns) + 1 dimensions that turns random planes by the given angles."""
    n = 2 * len(turns) + 1
    block = torch.zeros(n, n, dtype=torch.float64)
    for i, angle in enumerate(turns):
        block[2 * i, 2 * i + 1], block[2 * i + 1, 2 * i] = -angle, angle
    q = polar(normal(n, n, seed=seed))
    return q @ exp(block) @ q.mT, q @ block @ q.mT


@given(turns=st.lists(st.floats(-3.14, 3.14), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_log_and_angles_find_planted_planes(turns, seed):
    r, a = planted(turns, seed)
    torch.testing.assert_close(log(r), a, atol=1e-9, rtol=0)
    expected = sorted([0.0, *[abs(x) for x in turns for _ in range(2)]], reverse=True)
    torch.testing.assert_close(angles(r), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


@given(n=st.integers(1, 8), scale=st.floats(0, 0.5), seed=st.integers(0, 999))
def test_log_is_scipys_and_undoes_exp(n, scale, seed):
    a = scale * skew(n, seed=seed)
    r = exp(a)
    np.testing.assert_allclose(r, scipy.linalg.expm(a.numpy()), atol=1e-13)
    np.testing.assert_allclose(log(r), scipy.linalg.logm(r.numpy()).real, atol=1e-9)
    torch.testing.assert_close(exp(log(r)), r, atol=1e-11, rtol=0)


@pytest.mark.parametrize("angle", [1e-9, 1e-5])
def test_small_angles_keep_their_digits(angle):
    r, a = planted([angle, angle / 3])
    assert angles(r)[0] == pytest.approx(angle, rel=1e-6)
    assert (log(r) - a).norm() < 1e-6 * angle + 1e-15


def test_near_half_turns_keep_their_digits():
    r, a = planted([math.pi - 1e-4, 1.0])
    torch.testing.assert_close(log(r), a, atol=1e-9, rtol=0)


def test_float32_log():
    r, a = planted([0.3, 2.9, 1e-3])
    torch.testing.assert_close(log(r.float()), a.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reflection_half_turn_and_nan_are_refused(dtype):
    q = polar(normal(3, 3)).to(dtype)
    for diagonal, words in (([1, 1, -1], "determinant -1"), ([1, -1, -1], "eigenvalue -1")):
        with pytest.raises(NumericsError, match=words):
            log(q @ torch.diag(torch.tensor(diagonal, dtype=dtype)) @ q.mT)
    with pytest.raises(NumericsError, match="NaN"):
        log(torch.full((2, 2), torch.nan, dtype=dtype))


@given(t=st.floats(-1, 1), u=st.floats(-1, 1), seed=st.integers(0, 999))
def test_geodesic_is_a_one_parameter_group(t, u, seed):
    r, _ = planted([2.5, -0.7], seed)
    torch.testing.assert_close(geodesic(r, t) @ geodesic(r, u), geodesic(r, t + u), atol=1e-10, rtol=0)
    assert orthogonality_error(geodesic(r, t)) < 1e-11


def test_geodesic_ends():
    r, _ = planted([2.5, -0.7])
    torch.testing.assert_close(geodesic(r, 0.0), torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(geodesic(r, 1.0), r)
    torch.testing.assert_close(angles(geodesic(r, 0.5)), angles(r) / 2)


def test_batches():
    r = exp(0.3 * skew(2, 3, 4))
    torch.testing.assert_close(log(r)[1, 2], log(r[1, 2]))
    assert angles(r).shape == (2, 3, 4)
    assert orthogonality_error(r).shape == (2, 3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_rotation_is_procrustes_to_second_order(side, shape):
    w0, d = normal(*shape), normal(*shape, seed=1)
    errors = [
        (small_rotation(w0, h * d, side=side) - procrustes(w0, w0 + h * d, side=side)).norm() for h in (1e-3, 1e-4)
    ]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_rotation_generator_is_least_squares(side, shape):
    """Brute force over a basis of skew matrices, least norm."""
    w0, d, h = normal(*shape), normal(*shape, seed=1), 1e-6
    n = shape[1] if side == "right" else shape[0]
    rows, cols = torch.triu_indices(n, n, 1)
    basis = torch.zeros(len(rows), n, n, dtype=torch.float64)
    basis[range(len(rows)), rows, cols], basis[range(len(rows)), cols, rows] = 1, -1
    moved = w0 @ basis if side == "right" else basis @ w0
    weights = np.linalg.lstsq(moved.flatten(1).T.numpy(), d.flatten().numpy(), rcond=1e-10)[0]
    expected = (torch.from_numpy(weights)[:, None, None] * basis).sum(0)
    torch.testing.assert_close(log(small_rotation(w0, h * d, side=side)) / h, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_small_rotation_never_reflects(shape):
    """Even for updates larger than the smallest singular values, where Procrustes takes determinant -1."""
    for seed in range(20):
        r = small_rotation(normal(*shape, seed=seed), normal(*shape, seed=seed + 50), side="right")
        assert torch.linalg.det(r) == pytest.approx(1)
