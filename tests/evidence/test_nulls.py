"""Controls keep what they promise, and planted rotations come back along the calibration curve."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError
from rotrl.evidence.nulls import CONTROLS, check_controls, plant, planted_fraction, seeded
from rotrl.linalg.spectrum import Coordinates, basis, coordinates, moved
from rotrl.linalg.tangent import tangency, tangent_projection

SHAPES = [(30, 30), (20, 50), (50, 20)]
FRACTIONS = (0.0, 0.1, 0.3, 0.5, 1.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def controlled(control, W0, D, frame, generator):
    """A control of one matrix: a batch of one."""
    c = coordinates(frame, D)
    drawn = CONTROLS[control](W0[None], D[None], batched(c), [generator])
    return alone(drawn) if isinstance(drawn, Coordinates) else drawn[0]


def batched(c):
    return Coordinates(*(part[None] if isinstance(part, torch.Tensor) else part for part in c))


def alone(c):
    return Coordinates(*(part[0] if isinstance(part, torch.Tensor) else part for part in c))


def planted(c, fraction, side, generator):
    return alone(plant(batched(c), fraction, side=side, generators=[generator]))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_controls_have_the_norm_of_the_update_and_no_rotation(shape, control):
    W0 = random(*shape)
    frame, A = basis(W0), random(shape[0], shape[0], seed=1)
    D = 0.05 * (A - A.mT) @ W0  # a rotation, all of which the control must lose

    def draw(seed):
        drawn = controlled(control, W0, D, frame, seeded(seed, control))
        return coordinates(frame, drawn) if isinstance(drawn, torch.Tensor) else drawn

    drawn = draw(0)
    assert drawn.energy.sqrt() == pytest.approx(float(torch.linalg.matrix_norm(D)), rel=0.02)
    for side in ("left", "right"):
        found = tangency(drawn, side=side)
        assert abs(found.kappa) < 4 * found.kappa_spread
    assert torch.equal(drawn.T, draw(0).T)
    assert not torch.equal(drawn.T, draw(1).T)


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_flip_keeps_the_energy_of_every_pair(shape):
    W0, D = random(*shape), random(*shape, seed=1)
    frame = basis(W0)
    before = coordinates(frame, D)
    after = controlled("sign_flip", W0, D, frame, seeded(0))
    assert torch.allclose(after.T.abs(), before.T.abs())
    assert torch.allclose(after.below, before.below)
    assert torch.allclose(after.beside, before.beside)
    assert torch.allclose(after.outside.abs(), before.outside.abs())
    assert torch.linalg.eigvalsh(after.outside).min() > -1e-10 * before.energy


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_flip_in_coordinates_is_the_one_of_the_matrix(shape):
    W0, D = random(*shape), random(*shape, seed=1)
    frame = basis(W0)
    inside = controlled("sign_flip", W0, D, frame, seeded(0))
    found, expected = moved(inside, 3).s, torch.linalg.svdvals(W0 + flipped(D, frame, seeded(0)))
    if shape[0] >= shape[1]:  # wide ones draw the transposed signs
        assert torch.allclose(found, expected, rtol=1e-9)


def test_permuted_keeps_the_entries_and_the_spectrum():
    W0, D = random(6, 9), random(6, 9, seed=1)
    drawn = controlled("permuted", W0, D, basis(W0), seeded(0))
    assert torch.equal(drawn.flatten().sort().values, D.flatten().sort().values)
    assert torch.allclose(torch.linalg.svdvals(drawn), torch.linalg.svdvals(D))


def test_bf16_rounding_lands_on_bf16_numbers():
    W0, D = random(6, 9), 1e-3 * random(6, 9, seed=1)
    W1 = W0 + controlled("bf16_rounding", W0, D, basis(W0), seeded(0))
    assert torch.allclose(W1, W1.to(torch.bfloat16).double(), rtol=0, atol=1e-15)


def flipped(D, frame, generator):
    """The sign flip as a matrix."""
    if D.shape[0] < D.shape[1]:
        return flipped(D.mT, frame.mT, generator).mT
    U, s, V = frame

    def signs(*shape):
        return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1

    T = U.mT @ D @ V
    return (U @ (T * signs(*T.shape)) + (D @ V - U @ T) * signs(len(s))) @ V.mT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_planting_in_coordinates_is_planting_in_the_weights(shape, side):
    """The mean kappa over draws equals that of sqrt(1-f) flip + sqrt(f) P_T(flip'), built as matrices."""
    W0, D, f, draws = random(*shape), random(*shape, seed=1), 0.3, 60
    frame = basis(W0)
    c = coordinates(frame, D)
    norm = torch.linalg.matrix_norm(D)
    direct = []
    for i in range(draws):
        noise, carrier = (flipped(D, frame, seeded(i, half)) for half in ("noise", "carrier"))
        turn = tangent_projection(frame, carrier, side=side)
        made = (1 - f) ** 0.5 * noise + f**0.5 * norm * turn / torch.linalg.matrix_norm(turn)
        direct.append(tangency(coordinates(frame, made), side=side).kappa)
    inside = [tangency(planted(c, f, side, seeded(i)), side=side).kappa for i in range(draws)]
    direct, inside = torch.stack(direct), torch.stack(inside)
    error = ((direct.var() + inside.var()) / draws).sqrt()
    assert abs(direct.mean() - inside.mean()) < 4 * error


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_calibration_rises_from_nothing_to_an_exact_rotation(shape, side):
    c = coordinates(random(*shape), random(*shape, seed=1))
    found = [tangency(planted(c, f, side, seeded(0, str(f))), side=side) for f in FRACTIONS]
    kappas = [float(t.kappa) for t in found]
    assert abs(kappas[0]) < 4 * found[0].kappa_spread
    assert kappas[-1] == pytest.approx(1)
    assert kappas == sorted(kappas)
    assert 0.03 < kappas[2] < 0.3  # far below the planted .3: kappa is not linear


@pytest.mark.parametrize("side", ["left", "right"])
def test_planted_fractions_come_back(side):
    """The curve of one draw reads the fraction of an independent draw."""
    c = coordinates(random(120, 120), random(120, 120, seed=1))

    def kappa(f, draw):
        return float(tangency(planted(c, f, side, seeded(0, draw, str(f))), side=side).kappa)

    curve = [(f, kappa(f, "curve")) for f in FRACTIONS]
    for f in (0.1, 0.2, 0.4, 0.75, 1.0):
        assert planted_fraction(kappa(f, "update"), curve) == pytest.approx(f, abs=0.08)


@given(st.floats(-2, 2), st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_planted_fraction_is_a_fraction_and_hits_the_ends(kappa, kappas):
    curve = [(i / (len(kappas) - 1), k) for i, k in enumerate(kappas)]
    assert 0 <= planted_fraction(kappa, curve) <= 1
    assert planted_fraction(max(kappas) + 1, curve) == 1
    assert planted_fraction(kappas[0] - 1, curve) == 0


def test_unknown_control_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'isotropc', did you mean 'isotropic'\?; one of: isotropic, sign_flip"):
        check_controls(["sign_flip", "isotropc"])
