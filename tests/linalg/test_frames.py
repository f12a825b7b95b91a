"""Smallest rotations between frames against dense ones that Procrustes finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotrl.linalg.frames import frame_angles, polar_factors, smallest_turn, spanned, towards
from rotrl.linalg.procrustes import procrustes
from rotrl.linalg.rotation import angles, exp, geodesic

SHAPES = [(9, 3), (5, 3), (4, 4), (7, 1)]
SHAPED = pytest.mark.parametrize("shape", SHAPES)


def frames(shape: tuple[int, int], size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random frame, and where a random rotation with generators of length `size` takes it."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator))[0]
    a = torch.randn(shape[0], shape[0], dtype=torch.float64, generator=generator)
    a = size * (a - a.mT) / torch.linalg.matrix_norm(a - a.mT, 2)
    return q, exp(a) @ q


@SHAPED
@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.5, 1.5])
def test_the_smallest_turn_is_the_procrustes_rotation_nearest_to_the_identity(shape, size):
    q, other = frames(shape, size)
    r = smallest_turn(q, other)
    identity = torch.eye(shape[0], dtype=torch.float64)
    torch.testing.assert_close(r.mT @ r, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(r @ q, other, rtol=0, atol=1e-13)
    torch.testing.assert_close(r, procrustes(q, other, side="left", anchor=0.0), rtol=0, atol=1e-12)


@given(st.sampled_from(SHAPES[:2]), st.floats(1e-3, 3.0), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_no_other_rotation_to_the_frame_is_nearer(shape, size, seed):
    q, other = frames(shape, size, seed)
    r = smallest_turn(q, other)
    beside = torch.linalg.qr(q, mode="complete")[0][:, shape[1] :]  # R may do anything with these, before it acts
    a = torch.randn(beside.shape[1], beside.shape[1], dtype=torch.float64)
    moved = r @ (torch.eye(shape[0], dtype=torch.float64) + beside @ (exp(a - a.mT) - torch.eye(len(a))) @ beside.mT)
    torch.testing.assert_close(moved @ q, other, rtol=0, atol=1e-12)
    assert torch.trace(moved) <= torch.trace(r) + 1e-12


@SHAPED
def test_what_is_done_in_the_span_is_what_the_dense_rotation_does(shape):
    q, other = frames(shape, 0.8)
    stretch = torch.randn(shape[1], shape[1], dtype=torch.float64)
    w = q @ (torch.eye(shape[1]) + stretch @ stretch.mT)
    r = smallest_turn(q, other)
    basis, (inner,) = spanned(q, [other])
    whole = torch.eye(shape[0], dtype=torch.float64)
    torch.testing.assert_close(whole + basis @ (inner - torch.eye(len(inner))) @ basis.mT, r, rtol=0, atol=1e-12)
    assert basis.shape[1] == min(shape[0], 2 * shape[1])
    for t in (-0.5, 0.3, 1.0):
        torch.testing.assert_close(towards(w, other, t), geodesic(r, t) @ w, rtol=0, atol=1e-11)
    torch.testing.assert_close(frame_angles(w, other), angles(r), rtol=0, atol=1e-12)


@SHAPED
def test_polar_factors_of_a_batch(shape):
    w = torch.randn(2, *shape, dtype=torch.float64)
    q, p = polar_factors(w)
    torch.testing.assert_close(q @ p, w, rtol=0, atol=1e-13)
    torch.testing.assert_close(p @ p, w.mT @ w, rtol=1e-12, atol=1e-12)
    assert (torch.linalg.eigvalsh(p) > 0).all()
