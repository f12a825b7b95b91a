"""Bands against projections in the full basis, sign flips and noise; they add up to the whole."""

import pytest
import torch

from rotrl.evidence.bands import angles, directions, turns
from rotrl.evidence.bands import band_rows as columns
from rotrl.linalg.spectrum import basis, coordinates
from rotrl.linalg.tangent import generator, tangency, tangent_projection

SHAPES = [(12, 12), (8, 17), (17, 8)]
SIDES = ["left", "right"]
cases = pytest.mark.parametrize(("shape", "side"), [(shape, side) for shape in SHAPES for side in SIDES])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def band_rows(c, **options):
    for row in columns(c, **options):
        yield {key: float(value) if isinstance(value, torch.Tensor) else value for key, value in row.items()}


def full(W0):
    """Both full singular bases."""
    U, _, Vh = torch.linalg.svd(W0)
    return U, Vh.mT


def by_direction(T, r):
    """Half of every entry to its row and half to its column; beyond the basis all to the direction that is left."""
    found = torch.zeros(r, dtype=T.dtype)
    for i in range(T.shape[0]):
        for j in range(T.shape[1]):
            inside = [k for k in (i, j) if k < r]
            for k in inside:
                found[k] += T[i, j] ** 2 / len(inside)
    return found


@cases
def test_energy_and_share_of_directions_are_those_of_the_projection(shape, side):
    W0, D = random(*shape), random(*shape, seed=1)
    U, V = full(W0)
    found = directions(coordinates(W0, D), side=side)
    r = min(shape)
    assert torch.allclose(found.energy, by_direction(U.mT @ D @ V, r))
    part = tangent_projection(W0, D, side=side)
    assert torch.allclose(found.share, by_direction(U.mT @ part @ V, r))


@cases
def test_null_and_spread_of_a_band_are_those_of_sign_flips(shape, side):
    W0, D, r = random(*shape), random(*shape, seed=1), min(shape)
    U, V = full(W0)
    T, draw = U.mT @ D @ V, torch.Generator().manual_seed(2)
    shares = []
    for _ in range(4000):
        flipped = U @ (T * (torch.randint(0, 2, T.shape, generator=draw) * 2.0 - 1)) @ V.mT
        shares.append(directions(coordinates(W0, flipped), side=side).share)
    shares = torch.stack(shares)
    row = next(iter(band_rows(coordinates(W0, D), side=side, edges=[0.25])))
    band = shares[:, : round(0.25 * r)].sum(-1) / D.square().sum()
    error = float(band.std()) / 4000**0.5
    assert float(band.mean()) == pytest.approx(row["null"] * row["energy"], abs=4 * error)
    spread = (row["kappa_high"] - row["kappa"]) / 1.96
    assert band.std() / (row["energy"] * (1 - row["null"])) == pytest.approx(spread, rel=0.06)


@cases
def test_bands_add_up_to_the_whole(shape, side):
    W0, D = random(*shape), random(*shape, seed=1)
    c = coordinates(W0, D)
    whole, found = tangency(c, side=side), directions(c, side=side)
    assert found.energy.sum() == pytest.approx(float(c.energy))
    assert found.share.sum() / c.energy == pytest.approx(float(whole.share))
    assert found.null.sum() / c.energy == pytest.approx(float(whole.null))
    (row,) = [row for row in band_rows(c, side=side, edges=[]) if row["start"] == 0 and row["stop"] == 1]
    assert row["kappa"] == pytest.approx(float(whole.kappa))
    assert (row["kappa_high"] - row["kappa"]) / 1.96 == pytest.approx(float(whole.kappa_spread))
    rows = list(band_rows(c, side=side, edges=[0.1, 0.9]))
    assert len(rows) == 11 if min(shape) == 12 else len(rows) <= 11
    assert sum(row["energy"] for row in rows[:3]) == pytest.approx(1)
    assert sum(row["energy_noise"] for row in rows[:3]) == pytest.approx(1)


@cases
def test_bands_do_not_change_with_the_basis(shape, side):
    """W -> P W Q^T."""
    W0, D = random(*shape), random(*shape, seed=1)
    P, Q = (torch.linalg.qr(random(n, n, seed=n)).Q for n in shape)
    before, after = (
        list(band_rows(coordinates(a, b), side=side, edges=[0.1, 0.9]))
        for a, b in ((W0, D), (P @ W0 @ Q.mT, P @ D @ Q.mT))
    )
    for a, b in zip(before, after, strict=True):
        assert {**a, "side": 0} == pytest.approx({**b, "side": 0})


@cases
def test_a_rotation_of_the_head_is_found_there(shape, side):
    """A rotation in planes of the first directions: kappa 1 in their band, and no angle in the others."""
    W0 = random(*shape)
    U, s, V = basis(W0)
    vectors = (U if side == "left" else V)[:, :4]
    A = random(4, 4, seed=3)
    skew = vectors @ (A - A.mT) @ vectors.mT * 0.01
    D = skew @ W0 if side == "left" else W0 @ skew
    rows = list(band_rows(coordinates(W0, D), side=side, edges=[4 / len(s)]))
    head, rest = rows[:2]
    assert head["energy"] == pytest.approx(1)
    assert head["kappa"] == pytest.approx(1)
    assert head["angle"] > 0.1
    assert rest["angle"] < 1e-10


@cases
def test_angles_are_those_of_the_generator_and_the_line_is_that_of_noise(shape, side):
    W0, D = random(*shape), 0.01 * random(*shape, seed=1)
    frame = basis(W0)
    vectors = frame.U if side == "left" else frame.V
    moved = generator(W0, D, side=side) @ vectors
    found, noise = angles(coordinates(W0, D), side=side)
    assert torch.allclose(found, moved.norm(dim=0).rad2deg())
    inside = vectors.mT @ moved
    assert torch.allclose(turns(coordinates(W0, D), side=side), inside, atol=1e-12)
    size = D.norm() / D.numel() ** 0.5
    many = torch.stack([angles(coordinates(frame, size * random(*shape, seed=i)), side=side)[0] for i in range(600)])
    assert torch.allclose(many.square().mean(0).sqrt(), noise, rtol=0.12)
