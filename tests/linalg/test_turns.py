"""Rotations from updates against scipy's polar decomposition, and what is computed with them against explicit ones."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotrl.errors import NumericsError
from rotrl.linalg.small import exact_turns, small_turns, turns
from rotrl.linalg.turns import Turn

SHAPES = [(5, 5), (3, 7), (2, 11), (8, 3), (1, 6), (12, 20), (20, 12)]
SHAPED = pytest.mark.parametrize("shape", SHAPES)
SEEDS = st.integers(0, 10**6)


def models(shape, seed=0, count=2, size=0.02):
    rng = torch.Generator().manual_seed(seed)
    w0, *noise = (torch.randn(*shape, generator=rng, dtype=torch.float64) for _ in range(1 + count))
    return w0, [size * d for d in noise]


def fit(w0, d, anchor):
    w0, w = w0.numpy(), (w0 + d).numpy()
    mu = anchor * (w0**2).sum() / min(w0.shape)
    return torch.tensor(scipy.linalg.polar(w0.T @ w + mu * np.eye(w0.shape[1]))[0])


def generator(r):
    identity = torch.eye(len(r), dtype=r.dtype)
    return torch.linalg.solve(r + identity, r - identity)


def rotated(w0, r):
    return w0 @ r - w0


def explicit(found, turn):
    """F^T theta F."""
    rows = [found.frame, *(found.updates[k] - found.coefficients[k] @ found.frame for k in turn.of)]
    f = torch.cat(rows, -2)
    return f.mT @ turn.theta @ f


@SHAPED
@settings(max_examples=25)
@given(seed=SEEDS, size=st.floats(1e-6, 0.03), anchor=st.sampled_from([1e-3, 0.01, 0.3]))
def test_small_updates_have_the_procrustes_rotation(shape, seed, size, anchor):
    w0, updates = models(shape, seed, size=size)
    found = turns(w0, updates, anchor=anchor)
    for q, d in zip(found.generators, updates, strict=True):
        torch.testing.assert_close(found.move(found.cayley(q)), rotated(w0, fit(w0, d, anchor)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (8, 3), (12, 40), (40, 12)])
def test_no_singular_values_are_needed(shape):
    w0, updates = models(shape, size=0.01)
    found = small_turns(w0, updates, anchor=0.01)
    assert found is not None
    for q, d in zip(found.generators, updates, strict=True):
        torch.testing.assert_close(found.length(q).squeeze(), generator(fit(w0, d, 0.01)).norm(), rtol=1e-9, atol=0)
        torch.testing.assert_close(explicit(found, q), generator(fit(w0, d, 0.01)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (8, 3)])
def test_large_updates_are_refused_and_solved_by_singular_values(shape):
    refused = 0
    for seed in range(20):
        w0, updates = models(shape, seed, size=0.9)
        refused += small_turns(w0, updates, anchor=0.01) is None
        try:
            found = turns(w0, updates, anchor=0.01)
        except NumericsError:
            assert min(torch.linalg.det(fit(w0, d, 0.01)) for d in updates) < 0
            continue
        for q, d in zip(found.generators, updates, strict=True):
            torch.testing.assert_close(found.move(found.cayley(q)), rotated(w0, fit(w0, d, 0.01)), atol=1e-9, rtol=0)
    assert refused > 5


@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (160, 64)])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_float32_keeps_the_rotation_of_a_small_update(shape, size):
    """Relative to the update 1e-5 at a spectrum of two decades; from W0^T W_k in float32 it would be 1e-2."""
    w0, updates = models(shape, size=size)
    u, _, vh = torch.linalg.svd(w0, full_matrices=False)
    w0 = (u * 10 * torch.logspace(0, -2, 64, dtype=w0.dtype) @ vh).float()
    updates = [d.float() for d in updates]
    found = small_turns(w0, updates, anchor=0.01)
    assert found is not None
    for q, d in zip(found.generators, updates, strict=True):
        moved = found.move(found.cayley(q))
        assert moved.dtype == torch.float32
        assert (moved - rotated(w0.double(), fit(w0.double(), d.double(), 0.01))).norm() < 1e-5 * d.norm()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_float64_where_a_tiny_anchor_needs_it(shape):
    w0, (d, _) = models(shape, size=1e-5)
    u, s, vh = torch.linalg.svd(w0, full_matrices=False)
    s[-1] = 1e-4
    w0 = (u * s @ vh).float()
    found = turns(w0, [d.float()], anchor=1e-9)
    assert found.left.dtype == torch.float64 or found.frame.dtype == torch.float64
    expected = rotated(w0.double(), fit(w0.double(), d.float().double(), 1e-9))
    assert (found.move(found.cayley(found.generators[0])).double() - expected).norm() < 1e-4 * d.norm()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("values", [[1, 1, 1, 1], [1, 1e-3, 1e-6, 1e-9], [1, 1, 0, 0]])
def test_awkward_spectra_of_the_base(shape, values):
    w0, updates = models(shape, size=1e-3)
    u, s, vh = torch.linalg.svd(w0, full_matrices=False)
    s[:4] = torch.tensor(values)
    w0 = u * s @ vh
    found = turns(w0, updates, anchor=0.01)
    for q, d in zip(found.generators, updates, strict=True):
        torch.testing.assert_close(found.move(found.cayley(q)), rotated(w0, fit(w0, d, 0.01)), atol=1e-11, rtol=0)


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
def test_nothing_turns_where_there_is_no_base_or_no_update(shape):
    w0, (d, _) = models(shape)
    zero = torch.zeros_like(w0)
    for base, update in ((zero, d), (w0, zero), (zero, zero)):
        found = turns(base, [update], anchor=0.01)
        assert found.move(found.cayley(found.generators[0])).abs().max() < 1e-12
        assert found.length(found.generators[0]) < 1e-12


def test_nan_is_named():
    with pytest.raises(NumericsError, match="NaN"):
        turns(torch.full((3, 4), torch.nan), [torch.zeros(3, 4)], anchor=0.01)
    with pytest.raises(NumericsError, match="NaN"):
        turns(torch.eye(3), [torch.full((3, 3), torch.nan)], anchor=0.01)


@pytest.mark.parametrize("solve", [small_turns, exact_turns])
@pytest.mark.parametrize("shape", [(5, 5), (2, 9), (3, 7), (8, 3)])
def test_functions_of_generators_are_those_of_explicit_matrices(shape, solve):
    w0, updates = models(shape, seed=2, count=3)
    weights = [0.5, -1.0, 2.0]
    found = solve(w0, updates, anchor=0.01)
    rotations = [fit(w0, d, 0.01) for d in updates]
    identity = torch.eye(shape[1], dtype=torch.float64)

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)

    q = sum(c * generator(r) for c, r in zip(weights, rotations, strict=True))
    total = found.combined(found.generators, weights)
    close(found.length(total).squeeze(), q.norm())
    close(found.move(found.cayley(total)), rotated(w0, torch.linalg.solve(identity - q, identity + q)))

    logs = [torch.tensor(scipy.linalg.logm(r.numpy()).real) for r in rotations]
    a = sum(c * x for c, x in zip(weights, logs, strict=True))
    total = found.combined([found.log(x) for x in found.generators], weights)
    close(found.move(found.exp(total)), rotated(w0, torch.linalg.matrix_exp(a)))

    whole = [found.whole(x) for x in found.generators]
    first, second, _ = (found.combined([x]) for x in whole)
    close(found.move(found.compose(first, second)), rotated(w0, rotations[0] @ rotations[1]))
    mean = sum(rotations) / 3
    polar = found.polar(found.combined(whole, [1 / 3] * 3))
    close(found.move(polar), rotated(w0, torch.tensor(scipy.linalg.polar(mean.numpy())[0])))
    back = found.inverse_cayley(whole[0])
    close(back.theta, found.generators[0].theta)


@pytest.mark.parametrize("shape", [(4, 4), (2, 7), (7, 2)])
def test_batches_are_single_matrices(shape):
    w0, updates = models((3, *shape))
    together = turns(w0, updates, anchor=0.01)
    moved = together.move(together.cayley(together.combined(together.generators)))
    for i in range(3):
        single = turns(w0[i], [d[i] for d in updates], anchor=0.01)
        expected = single.move(single.cayley(single.combined(single.generators)))
        torch.testing.assert_close(moved[i], expected, atol=1e-13, rtol=0)
        assert together.length(together.generators[0])[i] == pytest.approx(single.length(single.generators[0]).item())


def test_large_angles_of_explicit_rotations():
    """The power series of log and exp are for small generators; beyond, eigenvectors take over."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 6))
    a = a - a.T
    a *= 2.5 / np.linalg.norm(a, 2)
    w0 = torch.eye(6, dtype=torch.float64)
    found = exact_turns(w0, [torch.tensor(scipy.linalg.expm(a)) - w0], anchor=0.0)
    log = found.log(found.generators[0])
    torch.testing.assert_close(explicit(found, log), torch.tensor(a), atol=1e-9, rtol=0)
    halved = found.exp(Turn(log.theta / 2, log.of))
    torch.testing.assert_close(found.move(halved), torch.tensor(scipy.linalg.expm(a / 2)) - w0, atol=1e-9, rtol=0)
