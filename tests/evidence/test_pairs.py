"""Two updates beside each other: planted agreement, and baselines against sign flips."""

import pytest
import torch

from rotrl.evidence.masks import changed, jaccard, jaccard_random, masks, overlap
from rotrl.evidence.pairs import Update
from rotrl.evidence.pairs import pair_row as columns
from rotrl.linalg.spectrum import basis, coordinates
from rotrl.linalg.tangent import generator

SHAPES = [(12, 12), (8, 17), (17, 8)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_row(a, b):
    return {key: float(value) for key, value in columns(a, b).items()}


def update(W0, D):
    return Update(D, coordinates(W0, D), changed(W0, W0 + D))


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_and_commutator_are_those_of_the_matrices(shape):
    W0, X, Y = random(*shape), random(*shape, seed=1), random(*shape, seed=2)
    Y = Y + X
    row = pair_row(update(W0, X), update(W0, Y))
    assert row["cosine"] == pytest.approx(float((X * Y).sum() / X.norm() / Y.norm()))
    A, B = (generator(W0, D, side="left" if shape[0] <= shape[1] else "right") for D in (X, Y))
    assert row["generators"] == pytest.approx(float((A * B).sum() / A.norm() / B.norm()))
    assert row["commutator"] == pytest.approx(float((A @ B - B @ A).norm() / A.norm() / B.norm()))
    same = pair_row(update(W0, X), update(W0, 2 * X))
    assert (same["cosine"], same["generators"]) == pytest.approx((1, 1))
    assert same["commutator"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_baselines_are_those_of_sign_flips(shape):
    W0, X, Y = random(*shape), random(*shape, seed=1), random(*shape, seed=2)
    U, _, Vh = torch.linalg.svd(W0)
    T, draw = U.mT @ Y @ Vh.mT, torch.Generator().manual_seed(3)
    a, told = update(W0, X), pair_row(update(W0, X), update(W0, Y))
    rows = []
    for _ in range(2000):
        flipped = U @ (T * (torch.randint(0, 2, T.shape, generator=draw) * 2.0 - 1)) @ Vh
        rows.append(pair_row(a, update(W0, flipped)))
    B = {key: torch.tensor([row[key] for row in rows]) for key in ("cosine", "generators", "commutator")}
    for key in ("cosine", "generators"):
        assert abs(B[key].mean()) < 4 * B[key].std() / 2000**0.5
        exact = shape[0] == shape[1] or key == "generators"  # beyond the basis energy counts as evenly spread
        assert B[key].std() == pytest.approx(told[f"{key}_spread"], rel=0.06 if exact else 0.15)
    assert B["commutator"].square().mean() ** 0.5 == pytest.approx(told["commutator_null"], rel=0.05)


def test_masks_on_planted_entries():
    W0 = torch.diag(torch.arange(10.0, 0, -1)).double() + 0.01 * random(10, 10)
    found = masks(W0, basis(W0), 0.1)
    assert found.principal.sum() == found.low.sum() == 10
    assert found.principal[0, 0]
    assert found.principal.diagonal().sum() == 1  # rank 1 holds one entry of the diagonal
    assert float(W0.abs()[found.low].max()) <= float(W0.abs()[~found.low].min())
    update = torch.zeros(10, 10, dtype=torch.bool)
    update.view(-1)[:20] = True
    assert overlap(update, update) == pytest.approx(1 / 0.2)
    assert overlap(~update, update) == 0
    assert overlap(torch.ones_like(update), update) == pytest.approx(1)


def test_changes_in_bf16_are_those_of_the_bits():
    W0 = random(20, 10).to(torch.bfloat16).float()
    W1 = W0.clone()
    W1[:5] *= 1 + 2**-6  # two steps of bfloat16
    W1[5:] *= 1 + 2**-12  # lost on the cast
    assert changed(W0, W1)[:5].all()
    assert not changed(W0, W1)[5:].any()
    assert changed(torch.zeros(2, 2), -torch.zeros(2, 2)).all()


def test_jaccard_of_equal_disjoint_and_independent_masks():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(400, 400, generator=draw) < p for p in (0.3, 0.2))
    assert jaccard(a, a) == 1
    assert jaccard(a, ~a) == 0
    assert jaccard(a, b) == pytest.approx(float(jaccard_random(a, b)), rel=0.02)
    empty = torch.zeros_like(a)
    assert jaccard(empty, empty).isnan()


def test_noise_in_bf16_changes_small_entries_more_often():
    """What is published as an affinity of RL to small weights: isotropic noise shows it."""
    W0 = random(120, 120).to(torch.bfloat16)
    noise = changed(W0, W0.double() + 1e-3 * random(120, 120, seed=1))
    found = masks(W0, basis(W0), 0.1)
    assert overlap(found.low, noise) > 1.5
    assert overlap(found.principal, noise) < 0.9
