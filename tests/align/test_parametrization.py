import math
from collections.abc import Callable

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotrl.align.manifold import Stiefel
from rotrl.align.parametrization import Rotations
from rotrl.align.sharing import side_of
from rotrl.errors import ConfigError
from rotrl.linalg.rotation import exp, log

STEPS = 300  # the budget of a planted rotation


def skew(n: int, angle: float, seed: int) -> Tensor:
    """Random generator whose largest plane angle is `angle`."""
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a = a - a.mT
    return a * angle / torch.linalg.matrix_norm(a, 2)


def matrices(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"wide0": (8, 12), "wide1": (8, 12), "tall0": (12, 8), "tall1": (12, 8), "square": (8, 8)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def optimise(rotations: Rotations, loss: Callable[[dict[str, Tensor]], Tensor], lr: float, steps: int) -> None:
    optimizer = geoopt.optim.RiemannianAdam(rotations.rotations, lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(rotations()).backward()
        optimizer.step()
        schedule.step()


def matrix_of(rotations: Rotations, name: str) -> Tensor:
    rotation = rotations.export()[name]
    found = rotation.right if rotation.left is None else rotation.left
    assert found is not None
    return found


def test_small_is_the_smaller_side_and_the_right_of_a_square():
    sides = {name: side_of(matrix.shape, "small") for name, matrix in matrices().items()}
    assert sides == {"wide0": "left", "wide1": "left", "tall0": "right", "tall1": "right", "square": "right"}


@pytest.mark.parametrize("side", ["small", "left", "right"])
def test_starts_at_the_identity_and_stacks_matrices_of_one_shape(side: str):
    given = matrices()
    rotations = Rotations(given, side=side)
    assert rotations.stacks == [("wide0", "wide1"), ("tall0", "tall1"), ("square",)]
    assert all(torch.equal(weight, given[name]) for name, weight in rotations().items())
    for name, matrix in given.items():
        acts = side_of(matrix.shape, side)
        assert matrix_of(rotations, name).shape[0] == matrix.shape[0 if acts == "left" else 1]


def test_unknown_side_is_named():
    with pytest.raises(ConfigError, match=r"align\.side='top'; one of: small, large, left, right, both"):
        Rotations(matrices(), side="top")


def test_export_applies_to_what_forward_gives():
    rotations = Rotations(matrices())
    rotations.assign([exp(skew(8, 0.7, 1)).expand(len(names), -1, -1) for names in rotations.stacks])
    rotated = rotations()
    for name, rotation in rotations.export().items():
        torch.testing.assert_close(rotation.apply(matrices()[name]), rotated[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("angle", [0.001, 0.3, 2.0])
def test_planted_rotations_come_back(angle: float):
    given = matrices()
    planted = {name: exp(skew(8, angle, seed)) for seed, name in enumerate(given)}
    target = {name: planted[name] @ w if w.shape[0] < w.shape[1] else w @ planted[name] for name, w in given.items()}
    rotations = Rotations(given)
    optimise(
        rotations,
        lambda rotated: torch.stack([(rotated[name] - target[name]).square().sum() for name in given]).sum(),
        lr=10 * angle / STEPS * 8**0.5,
        steps=STEPS,
    )
    for name in given:
        assert (matrix_of(rotations, name) - planted[name]).abs().max() < 1e-5


def test_the_second_moment_is_per_matrix_of_a_stack():
    """A gradient a thousand times larger beside it must not freeze a matrix: the first step has length lr for both."""
    rotations = Rotations(matrices())
    gradient = torch.randn(8, 12, dtype=torch.float64)
    rotated = rotations()
    ((gradient * rotated["wide0"]).sum() + 1000 * (gradient * rotated["wide1"]).sum()).backward()
    geoopt.optim.RiemannianAdam(rotations.rotations, lr=0.01).step()
    identity = torch.eye(8, dtype=torch.float64)
    for name in ("wide0", "wide1"):
        assert float((matrix_of(rotations, name) - identity).norm()) == pytest.approx(0.01, rel=1e-3)


def test_stacking_changes_no_number():
    given = {name: matrix for name, matrix in matrices().items() if name.startswith("wide")}
    target = {name: torch.randn(8, 12, dtype=torch.float64) for name in given}

    def learn(part: dict[str, Tensor]) -> Rotations:
        rotations = Rotations(part)
        optimise(
            rotations,
            lambda rotated: torch.stack([(rotated[name] - target[name]).square().sum() for name in part]).sum(),
            lr=0.05,
            steps=20,
        )
        return rotations

    together = learn(given)
    for name in given:
        alone = learn({name: given[name]})
        torch.testing.assert_close(matrix_of(alone, name), matrix_of(together, name), rtol=0, atol=1e-12)


def test_float32_stays_orthogonal_over_a_thousand_steps():
    rotations = Rotations(matrices(torch.float32))
    generator = torch.Generator().manual_seed(0)
    optimizer = geoopt.optim.RiemannianAdam(rotations.rotations, lr=0.05)
    for _ in range(1000):
        for part in rotations.rotations:
            part.grad = torch.randn(part.shape, generator=generator)
        optimizer.step()
    assert rotations.orthogonality_error() < 1e-5
    assert rotations.rms_angle() > 0.1


@given(st.floats(1e-6, 0.4), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_retraction_is_orthogonal_and_near_the_geodesic(length: float, seed: int):
    """Its second order is that of the geodesic: they differ by at most a^3 / 6."""
    x, a = exp(skew(6, 1.0, seed)), skew(6, length, seed + 1)
    y = Stiefel().retr(x, a)
    assert torch.linalg.matrix_norm(y.mT @ y - torch.eye(6), 2) <= 6e-6
    assert torch.linalg.matrix_norm(y - x @ exp(a), 2) <= length**3 / 6 + 1e-9


@given(st.floats(1e-4, 0.35), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_chord_stands_for_the_squared_logarithm(angle: float, seed: int):
    given = {name: torch.eye(8, dtype=torch.float64) for name in ("a", "b")}
    rotations = Rotations(given)
    generators = {name: skew(8, angle, seed + index) for index, name in enumerate(given)}
    rotations.assign([torch.stack([exp(a) for a in generators.values()])])
    truth = sum(float(log(exp(a)).square().sum()) for a in generators.values())
    assert float(rotations.squared_angle().detach()) == pytest.approx(truth, rel=angle**2 / 12 + 1e-9)
    assert float(rotations.rms_angle().detach()) == pytest.approx(math.sqrt(truth / 16), rel=angle**2 / 20 + 1e-9)
