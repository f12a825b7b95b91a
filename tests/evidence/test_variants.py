"""Parts of an update: they add up, cost what they should, and are what they are called."""

import pytest
import torch

from rotrl.errors import ConfigError
from rotrl.evidence.nulls import seeded
from rotrl.evidence.restore import layers, left_out, ranks, restorations
from rotrl.evidence.variants import DRAWN, SINGLE, SWAPS, Matrix, dose, nothing, whole
from rotrl.linalg.spectrum import basis, coordinates
from rotrl.linalg.tangent import tangent_projection

SHAPES = [(12, 12), (6, 15), (15, 6)]
SIDES = ["small", "left", "right"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[(shape, side) for shape in SHAPES for side in SIDES], ids=str)
def case(request):
    shape, side = request.param
    W0, D = random(*shape), 0.1 * random(*shape, seed=1)
    one_sided = side if side != "small" else "left" if shape[0] < shape[1] else "right"
    return W0, D, Matrix(W0, D, side), one_sided


def updates(x, seed=0):
    named = {**SINGLE, **DRAWN, **SWAPS, "nothing": nothing, "whole": whole}
    return {name: x.update(variant, seeded(seed, name)) for name, variant in named.items()}


def test_energies_are_equal_where_they_should_be(case):
    W0, D, x, side = case
    found = updates(x)
    assert all(change.shape == D.shape for change in found.values())
    assert torch.equal(found["whole"], D)
    assert not found["nothing"].any()
    assert torch.allclose(found["tangent"], tangent_projection(W0, D, side=side))
    assert torch.allclose(found["tangent"] + found["complement"], D)
    energy = found["tangent"].norm()
    for name in ("random", "plane", "part", "scaled"):
        assert found[name].norm() == pytest.approx(float(energy)), name
    for swap in ("vectors", "values"):
        moved, control = ((D if swap == "vectors" else 0) - found[name] for name in (swap, f"{swap}_control"))
        assert moved.norm() == pytest.approx(float(control.norm())), swap


def test_random_is_a_rotation_with_the_energy_of_the_update_in_every_plane(case):
    W0, D, x, side = case
    drawn = x.update(DRAWN["random"], seeded(0))
    assert torch.allclose(tangent_projection(W0, drawn, side=side), drawn, atol=1e-10)
    before, after = coordinates(W0, tangent_projection(W0, D, side=side)), coordinates(W0, drawn)
    assert torch.allclose(before.T.abs(), after.T.abs(), atol=1e-10)
    assert torch.allclose(before.below + before.beside, after.below + after.beside, atol=1e-10)
    many = torch.stack([x.update(DRAWN["random"], seeded(i)) for i in range(300)])
    cosine = (many * D).sum((-2, -1)) / (many[0].norm() * D.norm())
    assert abs(cosine.mean()) < 4 * cosine.std() / 300**0.5


def test_plane_directions_are_projections_with_the_signs_of_a_draw(case):
    """Brute force on every plane: project (T_ij, T_ji) on (s_j, +-s_i); all plus is P_T, all minus a pure stretch."""
    x = case[2]
    U, s, V = x.frame
    T = U.mT @ x.D @ V
    drawn = U.mT @ DRAWN["plane"](x, seeded(0)) @ V
    same, ratios = 0, []
    for i in range(len(s)):
        for j in range(i):
            turn, stretch = (torch.stack([s[j], sign * s[i]]) / torch.hypot(s[i], s[j]) for sign in (-1, 1))
            pair = torch.stack([T[i, j], T[j, i]])
            found = torch.stack([drawn[i, j], drawn[j, i]])
            options = [(pair @ d) * d for d in (turn, stretch)]
            scales = [(found @ o) / (o @ o) for o in options]
            errors = [float((found - scale * o).norm()) for scale, o in zip(scales, options, strict=True)]
            best = errors.index(min(errors))
            assert errors[best] < 1e-10
            ratios.append(float(scales[best]))
            same += best == 0
    assert 0.2 < same / len(ratios) < 0.8
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert drawn.diagonal().abs().max() < 1e-10


def test_finite_rotation_and_swaps_are_what_they_are_called(case):
    W0, D, x, side = case
    found, frame, after = updates(x), basis(W0), basis(W0 + D)
    for t in (0.25, 1.25):
        turned = W0 + x.update(dose(t, rotated=True), seeded(0))
        gram = (lambda W: W.mT @ W) if side == "left" else (lambda W: W @ W.mT)
        assert torch.allclose(gram(turned), gram(W0), atol=1e-10)
        assert torch.allclose(x.update(dose(t, rotated=False), seeded(0)), t * D)
    assert torch.allclose(x.update(dose(1.0, rotated=True), seeded(0)), found["rotation"], atol=1e-10)
    assert (found["rotation"] - found["tangent"]).norm() < 0.3 * found["tangent"].norm()
    assert torch.allclose(basis(W0 + found["vectors"]).s, frame.s)
    assert torch.allclose(W0 + found["vectors"], after.U @ torch.diag(frame.s) @ after.V.mT)
    assert torch.allclose(W0 + found["values"], frame.U @ torch.diag(after.s) @ frame.V.mT)
    assert coordinates(W0, found["values_control"]).T.diagonal().abs().max() < 1e-10


def test_a_part_keeps_what_points_along_the_update(case):
    _, D, x, _ = case
    for name in ("part", "plane"):
        kept = x.update(DRAWN[name], seeded(0))
        assert (kept * D).sum() / (kept.norm() * D.norm()) > 0.2


def test_restored_ranks_have_the_vectors_of_the_base_and_the_values_of_the_expert(case):
    W0, D, x, _ = case
    before, after = basis(W0), basis(W0 + D)
    r = len(before.s)
    expected = sum(
        after.s[i] * torch.outer((source := before if i < r // 2 else after).U[:, i], source.V[:, i]) for i in range(r)
    )
    assert torch.allclose(W0 + x.update(ranks(0, 0.5), seeded(0)), expected)
    everything = x.update(ranks(0, 1), seeded(0))
    assert torch.allclose(everything, x.update(SWAPS["values"], seeded(0)))
    assert torch.allclose(x.update(layers(0, 0.5), seeded(0)), everything)  # depth 0
    assert torch.allclose(x.update(layers(0.5, 1), seeded(0)), D)


@pytest.mark.parametrize("restored", [ranks(0, 0.3), ranks(0.7, 1), layers(0, 1)])
def test_the_control_of_a_restoration_lacks_as_much_of_the_update(case, restored):
    """In the mean over draws: the same energy, the same distance from D, the same part of D gone."""
    _, D, x, _ = case
    size = D.square().sum()

    def told(change):
        return torch.stack([change.square().sum(), (D - change).square().sum(), (change * D).sum()]) / size

    wanted = told(x.update(restored, seeded(0)))
    control = left_out(float(wanted[0]), float(wanted[1]))
    draws = torch.stack([told(x.update(control, seeded(i))) for i in range(200)])
    error = draws.std(0) / 200**0.5
    assert ((draws.mean(0) - wanted).abs() < 4 * error + 0.03).all()  # coordinates scaled to their share: .03


@pytest.mark.parametrize(
    ("spans", "message"),
    [({"rank": [[0, 1]]}, "'rank' is not ranks or layers"), ({"ranks": [[0.5, 0.2]]}, r"\[0.5, 0.2\] is no span")],
)
def test_wrong_restorations_are_one_line(spans, message):
    with pytest.raises(ConfigError, match=message):
        restorations(spans)


def test_restorations_are_named_by_their_span():
    assert list(restorations({"ranks": [[0, 0.2]], "layers": [[0.75, 1]]})) == ["ranks_0-20", "layers_75-100"]


def test_an_unmoved_matrix_stays(case):
    W0, D, _, _ = case
    x = Matrix(W0, torch.zeros_like(D), "small")
    assert all(not change.any() for change in updates(x).values())
