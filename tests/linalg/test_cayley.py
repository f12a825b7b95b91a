"""Cayley transform against its closed form in the plane, its inverse, and the exponential."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import NumericsError
from rotrl.linalg.cayley import cayley, inverse_cayley
from rotrl.linalg.rotation import exp, orthogonality_error


def skew(*shape, seed=0):
    a = torch.randn(*shape, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a - a.mT


def plane(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@given(angle=st.floats(-3.1, 3.1))
def test_in_the_plane_q_is_the_tangent_of_half_the_angle(angle):
    q = torch.tensor([[0, -1.0], [1, 0]], dtype=torch.float64) * math.tan(angle / 2)
    torch.testing.assert_close(cayley(q), plane(angle))
    torch.testing.assert_close(inverse_cayley(plane(angle)), q)


@given(n=st.integers(1, 8), scale=st.floats(0, 10), seed=st.integers(0, 999))
def test_inverse_and_orthogonality(n, scale, seed):
    q = scale * skew(n, seed=seed)
    r = cayley(q)
    assert orthogonality_error(r) < 1e-12
    torch.testing.assert_close(inverse_cayley(r), q, atol=1e-9 * (1 + scale**2), rtol=1e-9)


def test_half_the_generator_agrees_with_exp_to_third_order():
    errors = [(cayley(h * skew(5) / 2) - exp(h * skew(5))).norm() for h in (1e-2, 1e-3)]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(3, abs=0.05)


def test_batches():
    q = skew(2, 3, 4)
    torch.testing.assert_close(cayley(q)[1, 2], cayley(q[1, 2]))
    torch.testing.assert_close(inverse_cayley(cayley(q)), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reflection_and_half_turn_are_refused(dtype):
    with pytest.raises(NumericsError, match="determinant -1"):
        inverse_cayley(torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=dtype)))
    with pytest.raises(NumericsError, match="eigenvalue -1"):
        inverse_cayley(torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=dtype)))
    with pytest.raises(NumericsError, match="eigenvalue -1"):
        inverse_cayley(plane(math.pi - 1e-8).to(dtype))
