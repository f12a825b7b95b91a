"""Thin frames in place of rotations of the larger side: against dense rotations, planted, through the whole stage."""

import csv
import json
import math
from pathlib import Path

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotrl.align.closed_form import procrustes
from rotrl.align.fit import cayley, stiefel
from rotrl.align.frames import Frames, StiefelFrames, stiefel_family
from rotrl.align.parametrization import Rotations
from rotrl.checkpoint.rotations import Rotation, open_rotations
from rotrl.errors import ConfigError
from rotrl.linalg.frames import frame_angles, polar_factors, smallest_turn
from rotrl.linalg.procrustes import procrustes as nearest_rotation
from rotrl.linalg.rotation import exp, geodesic, orthogonality_error
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge_state

STEPS = 300  # the budget of a planted frame
SHAPES = {"wide0": (4, 12), "wide1": (4, 12), "tall": (12, 4), "taller": (13, 4), "square": (6, 6)}


def matrices(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}


def turned(weight: Tensor, angle: float, seed: int) -> Tensor:
    """By a random dense rotation of the larger side."""
    d = max(weight.shape)
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    r = exp(angle * (a - a.mT) / torch.linalg.matrix_norm(a - a.mT, 2))
    return weight @ r if weight.shape[0] < weight.shape[1] else r @ weight


def test_large_means_frames_where_each_matrix_turns_alone():
    given = matrices()
    family = stiefel_family(given, side="large")
    assert isinstance(family, Frames)
    assert [tuple(part.shape) for part in family.rotations] == [(2, 12, 4), (1, 12, 4), (1, 13, 4), (1, 6, 6)]
    for name, weight in family().items():
        torch.testing.assert_close(weight, given[name], rtol=0, atol=1e-13)
    assert float(family.rms_angle().detach()) < 1e-6
    blocks = stiefel_family({"tall": given["tall"]}, side="large", block=3)
    assert type(blocks) is Rotations
    assert blocks.rotations[0].shape == (1, 4, 3, 3)


@pytest.mark.parametrize("angle", [0.001, 0.3, 2.0])
def test_planted_rotations_come_back(angle: float):
    """Learned in the budget and in closed form: the frames are those of the turned weights, which are reached."""
    source = matrices()
    target = {name: turned(weight, angle, seed) for seed, (name, weight) in enumerate(source.items())}
    family, solved = Frames(source), Frames(source)
    solved.assign(solved.closed_form(lambda name: [(1.0, target[name], None)], anchor=0.0))
    optimizer = geoopt.optim.RiemannianAdam(family.rotations, lr=10 * angle / STEPS * 12**0.5, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / STEPS)))
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.stack([(w - target[name]).square().sum() for name, w in family().items()]).sum().backward()
        optimizer.step()
        schedule.step()
    for name, weight in source.items():
        torch.testing.assert_close(solved()[name], target[name], rtol=0, atol=1e-8)
        torch.testing.assert_close(family()[name], target[name], rtol=0, atol=1e-5)
        assert orthogonality_error(sides(family.export()[name])) < 1e-12
        torch.testing.assert_close(solved.export()[name].apply(weight), target[name], rtol=0, atol=1e-8)


def sides(rotation: Rotation) -> Tensor:
    side = rotation.left if rotation.right is None else rotation.right.mT
    assert side is not None
    return side


def test_the_closed_form_is_that_of_dense_rotations():
    """Of targets that no rotation reaches, too."""
    source = matrices()
    target = {name: weight + 0.3 * torch.randn_like(weight) for name, weight in source.items()}
    family = Frames(source)
    found = family.by_tensor(family.closed_form(lambda name: [(1.0, target[name], None)], anchor=0.0))
    for name, weight in source.items():
        side = "right" if weight.shape[0] < weight.shape[1] else "left"
        dense = nearest_rotation(weight, target[name], side=side, anchor=0.0)
        expected = Rotation(**{side: dense}).apply(weight)
        torch.testing.assert_close(found[name].apply(weight), expected, rtol=0, atol=1e-10)
        if name != "square":
            small, frame = (w if side == "left" else w.mT for w in (weight, getattr(found[name], side)))
            r = smallest_turn(polar_factors(small)[0], frame)
            torch.testing.assert_close(r if side == "left" else r.mT, dense, rtol=0, atol=1e-10)


def test_the_anchor_holds_frames_where_they_are():
    source = matrices()
    target = {name: weight + 0.3 * torch.randn_like(weight) for name, weight in source.items()}
    lengths = []
    for anchor in (0.0, 1.0, 1e6):
        family = Frames(source)
        family.assign(family.closed_form(lambda name: [(1.0, target[name], None)], anchor=anchor))
        lengths.append(float(family.rms_angle().detach()))
    assert lengths[0] > lengths[1] > 10 * lengths[2]
    assert lengths[2] < 1e-5


def test_the_closed_form_of_activations_on_the_left():
    """No frame nearby betters `sum_k w_k |(Q' P - T_k) X_k|^2`; of wide matrices the metric has no closed form."""
    source, generator = matrices(), torch.Generator().manual_seed(0)
    terms = {}
    for name, weight in source.items():
        inputs = [torch.randn(weight.shape[1], 30, dtype=torch.float64, generator=generator) for _ in range(2)]
        noise = [torch.randn(weight.shape, dtype=torch.float64, generator=generator) for _ in range(2)]
        targets = [weight + 0.2 * x for x in noise]
        terms[name] = [(c, t, x @ x.mT) for c, t, x in zip((0.7, 0.3), targets, inputs, strict=True)]
    family, plain = Frames(source), Frames(source)
    family.assign(family.closed_form(terms.__getitem__, anchor=0.0))
    plain.assign(plain.closed_form(lambda name: [(c, t, None) for c, t, _ in terms[name]], anchor=0.0))
    for name in ("wide0", "wide1"):
        torch.testing.assert_close(family()[name], plain()[name])
    best = {name: weight.detach() for name, weight in family().items()}

    def missed(name: str, weight: Tensor) -> float:
        return float(sum(c * ((weight - t) @ metric * (weight - t)).sum() for c, t, metric in terms[name]))

    for name in ("tall", "taller", "square"):
        assert missed(name, best[name]) < missed(name, plain()[name].detach())
        for seed in range(10):
            assert missed(name, turned(best[name], 0.01, seed)) > missed(name, best[name])


@given(st.floats(1e-6, 0.5), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_retraction_is_orthogonal_and_near_the_geodesic(length: float, seed: int):
    """geoopt's exponential of the same tangent vector differs in the third order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linalg.qr(torch.randn(2, 7, 3, dtype=torch.float64, generator=generator))[0]
    manifold = StiefelFrames()
    u = manifold.proju(x, torch.randn(2, 7, 3, dtype=torch.float64, generator=generator))
    u = length * u / torch.linalg.matrix_norm(u, 2).max()
    y = manifold.retr(x, u)
    assert orthogonality_error(y).max() < 1e-7
    assert (y - manifold.expmap(x, u)).abs().max() <= length**3 + 1e-7


def test_float32_stays_orthogonal_over_a_thousand_steps():
    family = Frames(matrices(torch.float32))
    generator = torch.Generator().manual_seed(0)
    optimizer = geoopt.optim.RiemannianAdam(family.rotations, lr=0.05)
    for _ in range(1000):
        for part in family.rotations:
            part.grad = torch.randn(part.shape, generator=generator)
        optimizer.step()
    assert family.orthogonality_error() < 1e-5
    assert family.rms_angle() > 0.1


@given(st.floats(1e-4, 0.35), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_chord_stands_for_the_squared_logarithm(angle: float, seed: int):
    source = matrices()
    family = Frames({"tall": source["tall"]})
    other = polar_factors(turned(source["tall"], angle, seed))[0]
    family.assign([other[None]])
    truth = float(frame_angles(source["tall"], other).square().sum())
    assert float(family.squared_angle().detach()) == pytest.approx(truth, rel=angle**2 / 3 + 1e-6)


WEIGHT = {
    "objective": "weight",
    "rollouts": None,
    "trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 100},
}


def test_the_stage_reaches_the_closed_form_and_leaves_frames(call, pair, tmp_path: Path):
    base, _, _ = pair
    hyper = {"side": "large", "angle_prior": 0.0, "lr": 0.01, "steps": 200, **WEIGHT}
    learned = call(stiefel, tmp_path / "learned", **hyper)
    solved = call(procrustes, tmp_path / "solved", rollouts=None, side="large")
    assert 0 < learned["explained"] - learned["closed_form"] < 0.02  # which the anchor holds back
    assert learned["closed_form"] == pytest.approx(solved["explained"], abs=1e-7)
    assert learned["orthogonality_error"] < 1e-5
    file = open_rotations(tmp_path / "learned" / "rotations.safetensors")
    rows = {row["tensor"]: row for row in csv.DictReader((tmp_path / "learned" / "align.csv").open())}
    for name in file.names:
        shape = base.tensors[name].shape
        (side, held), *more = file.sides[name].items()
        assert (side, held, more) == ("left" if shape[0] >= shape[1] else "right", tuple(shape), [])
        assert rows[name]["side"] == side
    start = call(stiefel, tmp_path / "start", init="procrustes", **{**hyper, "steps": 1, "lr": 1e-9})
    assert start["explained"] == pytest.approx(solved["explained"], abs=1e-5)


def test_the_way_along_learned_frames(call, pair, tmp_path: Path):
    """`learned` at t, and the path between experts, against the dense smallest rotation."""
    base, experts, _ = pair
    call(stiefel, tmp_path, source="math", teachers=["code"], side="large", steps=30, batch=8, lr=1e-2)
    file = open_rotations(tmp_path / "rotations.safetensors")
    half = merge_state(
        base, experts, bind(shipped("learned", t=0.5), list(experts)), tmp_path / "rotations.safetensors"
    )
    aligned = bind(shipped("geodesic_aligned", t=0.5), list(experts))
    path = merge_state(base, experts, aligned, tmp_path / "rotations.safetensors")
    for name in file.names:
        first, second = (experts[key].read(name).double() for key in ("math", "code"))
        rotation = file.rotation(name)
        assert rotation is not None
        side = "left" if first.shape[0] >= first.shape[1] else "right"
        w, frame = (x if side == "left" else x.mT for x in (first, getattr(rotation, side).double()))
        r = frame if frame.shape[0] == frame.shape[1] else smallest_turn(polar_factors(w)[0], frame)
        expected = geodesic(r, 0.5) @ w
        expected = expected if side == "left" else expected.mT
        torch.testing.assert_close(half[name].double(), expected, rtol=0, atol=1e-6)
        between = expected + 0.5 * (second - rotation.apply(first))
        torch.testing.assert_close(path[name].double(), between, rtol=0, atol=1e-6)
        assert (half[name] - first).abs().max() > 1e-4


def shipped(name: str, **changes) -> dict:
    return {"_target_": f"rotrl.merge.rotation.{name}", "_partial_": True, **changes}


def test_what_was_learned_is_what_the_merge_makes(call, pair, tmp_path: Path):
    base, experts, _ = pair
    summary = call(stiefel, tmp_path, side="large", teachers=["math"], steps=30, batch=8, lr=2e-3)
    assert sum(summary["kl_after"].values()) < 0.98 * sum(summary["kl_before"].values())
    merged = merge_state(base, experts, bind(shipped("learned"), list(experts)), tmp_path / "rotations.safetensors")
    file = open_rotations(tmp_path / "rotations.safetensors")
    for name in file.names:
        torch.testing.assert_close(merged[name], file.get(name).apply(base.read(name)))  # type: ignore[union-attr]
    assert json.loads(json.dumps(summary)) == summary


def test_frames_are_no_adapter_and_say_so_before_the_fit(call, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"align\.adapter: 'model.layers.0.mlp.down_proj.weight' has a thin frame"):
        call(stiefel, tmp_path, side="large", adapter=True, steps=1)
    assert not (tmp_path / "align.ckpt").exists()


def test_the_larger_side_by_other_parametrisations_is_dense(call, tmp_path: Path):
    call(cayley, tmp_path, side="large", steps=1, lr=1e-3, **WEIGHT)
    sides = open_rotations(tmp_path / "rotations.safetensors").sides
    assert sides["model.layers.0.mlp.up_proj.weight"] == {"left": (32, 32)}
    assert sides["model.layers.0.mlp.down_proj.weight"] == {"right": (32, 32)}
