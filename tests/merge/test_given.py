"""Merges of rotations that files give: against scipy on dense rotations, the closed form, and what does not fit."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.checkpoint.rotations import Delta, Rotation, save_rotations
from rotrl.errors import ConfigError
from rotrl.linalg.frames import polar_factors, smallest_turn
from rotrl.linalg.procrustes import procrustes
from rotrl.linalg.rotation import exp
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.given import from_samples
from rotrl.merge.mean_rotation import chordal, karcher_rotation, lie_mean
from rotrl.merge.plan import plan_merge
from rotrl.merge.rotation import learned, lie_sum, sequential

SEEDS = st.integers(0, 10**6)
SIDED = pytest.mark.parametrize("side", ["left", "right"])
SHAPED = pytest.mark.parametrize("shape", [(5, 5), (3, 8), (7, 3)])
FRAMES = pytest.mark.parametrize("shape", [(9, 3), (3, 10), (5, 3)])  # of three frames, in all dimensions and in some
MEANS = [lie_mean, karcher_rotation, chordal]


def turned(d: int, size: float, generator: torch.Generator) -> torch.Tensor:
    a = torch.randn(d, d, dtype=torch.float64, generator=generator)
    return exp(size * (a - a.mT) / torch.linalg.matrix_norm(a - a.mT, 2))


def problem(shape, seed, count=2, frames=False, side="right", size=0.6):
    """Base, experts, given rotations and what they are as dense ones on that side."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, dtype=torch.float64, generator=generator)
    experts = [base + 0.1 * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]
    d = shape[0 if side == "left" else 1]
    dense = [turned(d, size, generator) for _ in range(count)]
    held = dense
    if frames:
        tall = base if side == "left" else base.mT
        q = polar_factors(tall)[0]
        ends = [r @ q for r in dense]
        held = [end if side == "left" else end.mT for end in ends]
        dense = [smallest_turn(q, end) for end in ends]
        dense = dense if side == "left" else [r.mT for r in dense]
    return base, experts, [Rotation(**{side: r}) for r in held], dense


def turn(w, r, side):
    return w @ r if side == "right" else r @ w


def by_scipy(base, experts, dense, side, weights, scale, rest):
    logs = sum(c * scipy.linalg.logm(r.numpy()).real for c, r in zip(weights, dense, strict=True))
    residual = sum(c * (e - turn(base, r, side)).numpy() for c, e, r in zip(weights, experts, dense, strict=True))
    return turn(base.numpy(), scipy.linalg.expm(scale * logs), side) + scale * rest * residual


@SIDED
@SHAPED
@given(seed=SEEDS, weights=st.lists(st.floats(0.2, 2), min_size=2, max_size=2), scale=st.floats(0, 1))
def test_lie_sum(side, shape, seed, weights, scale):
    base, experts, rotations, dense = problem(shape, seed, side=side)
    expected = by_scipy(base, experts, dense, side, weights, scale, 0.7)
    hyper = {"weights": weights, "scale": scale, "residual_scale": 0.7, "rotations": rotations}
    for said in ("left", "right"):  # the file's side counts
        np.testing.assert_allclose(lie_sum(base, experts, side=said, **hyper), expected, atol=1e-9)  # type: ignore[arg-type]


@FRAMES
@given(seed=SEEDS, weights=st.lists(st.floats(0.2, 2), min_size=2, max_size=2))
def test_lie_sum_of_frames(shape, seed, weights):
    side = "left" if shape[0] > shape[1] else "right"
    base, experts, rotations, dense = problem(shape, seed, frames=True, side=side)
    expected = by_scipy(base, experts, dense, side, weights, 1.0, 1.0)
    np.testing.assert_allclose(lie_sum(base, experts, weights=weights, rotations=rotations), expected, atol=1e-9)
    mixed = [rotations[0], Rotation(**{side: dense[1]})]
    np.testing.assert_allclose(lie_sum(base, experts, weights=weights, rotations=mixed), expected, atol=1e-9)


@pytest.mark.parametrize("frames", [False, True])
def test_sequential(frames):
    base, experts, rotations, dense = problem((9, 3), 5, count=3, frames=frames, side="left")
    rest = sum(e - r @ base for e, r in zip(experts, dense, strict=True))
    expected = dense[2] @ dense[1] @ dense[0] @ base + rest
    np.testing.assert_allclose(sequential(base, experts, rotations=rotations), expected, atol=1e-9)


@pytest.mark.parametrize("function", MEANS)
@pytest.mark.parametrize("frames", [False, True])
def test_means(function, frames):
    """Of equal rotations it is that one; of others the mean is scipy's of the dense ones."""
    base, experts, rotations, dense = problem((9, 3), 0, count=3, frames=frames, side="left")
    same = function(base, experts, rotations=[rotations[0]] * 3, residual_scale=0.0)
    np.testing.assert_allclose(same, dense[0] @ base, atol=1e-10)
    logs = [scipy.linalg.logm(r.numpy()).real for r in dense]
    mean = scipy.linalg.expm(sum(logs) / 3)
    if function is chordal:
        mean = scipy.linalg.polar(sum(r.numpy() for r in dense))[0]
    if function is karcher_rotation:
        for _ in range(20):
            step = scipy.linalg.expm(sum(scipy.linalg.logm(mean.T @ r.numpy()).real for r in dense) / 3)
            mean = scipy.linalg.polar(mean @ step)[0]
    rest = sum(e - r @ base for e, r in zip(experts, dense, strict=True)) / 3
    expected = mean @ base.numpy() + rest.numpy()
    np.testing.assert_allclose(function(base, experts, rotations=rotations), expected, atol=1e-9)


@SHAPED
@SIDED
def test_closed_form_rotations_that_are_given_give_the_closed_form_merge(shape, side):
    base, experts, _, _ = problem(shape, 3)
    found = [Rotation(**{side: procrustes(base, e, side=side, anchor=0.01)}) for e in experts]
    for function in (lie_sum, sequential, *MEANS):
        hyper = {"scale": 0.8, "residual_scale": 0.5}
        expected = function(base, experts, side=side, anchor=0.01, **hyper)
        np.testing.assert_allclose(function(base, experts, rotations=found, **hyper), expected, atol=1e-9)


@FRAMES
@pytest.mark.parametrize("frames", [False, True])
def test_one_expert_is_what_was_learned(shape, frames):
    side = "left" if shape[0] > shape[1] else "right"
    base, experts, rotations, _ = problem(shape, 1, count=1, frames=frames, side=side)
    for t in (0.4, 1.0):
        along = learned(base, experts, source=base, rotation=rotations[0], t=t)
        alone = lie_sum(base, experts, rotations=rotations, scale=t, residual_scale=0.0)
        np.testing.assert_allclose(alone, along, atol=1e-10)
    np.testing.assert_allclose(lie_sum(base, experts, rotations=rotations), experts[0], atol=1e-10)


def test_where_a_file_has_no_rotation_the_whole_update_is_residual():
    base, experts, rotations, _ = problem((9, 3), 2, frames=True, side="left")
    updates = [e - base for e in experts]
    np.testing.assert_allclose(lie_sum(base, experts, rotations=[None, None]), base + sum(updates), atol=1e-12)
    half = lie_sum(base, experts, rotations=[rotations[0], None])
    np.testing.assert_allclose(half, experts[0] + updates[1], atol=1e-10)


Q = "model.layers.0.self_attn.q_proj.weight"


def write(path, trio, expert, *, source="base", side="right", shape=None, towards=None, seed=0):
    """A rotation of q of the base towards an expert; 16 dimensions unless `shape` says otherwise."""
    base, experts = trio
    generator = torch.Generator().manual_seed(seed)
    r = turned(16, 0.2, generator) if shape is None else torch.ones(shape)
    inputs = {"base": base.sha256, "them": experts[towards or expert].sha256}
    told = {"source": json.dumps({"model": source}), "inputs": json.dumps(inputs), "teachers": '["them"]'}
    save_rotations(path, {Q: Rotation(**{side: r})}, told)
    return str(path)


def test_through_the_engine(trio, method, tmp_path):
    base, experts = trio
    files = {name: write(tmp_path / f"{name}.safetensors", trio, name, seed=i) for i, name in enumerate(experts)}
    bound = method("lie_sum", rotations=files, residual_scale=0.3)
    state = merge_state(base, experts, bound)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    given = [Rotation(right=turned(16, 0.2, generator).float()) for generator in generators]
    w0, *ws = (model.read(Q) for model in (base, *experts.values()))
    torch.testing.assert_close(state[Q], lie_sum(w0, ws, residual_scale=0.3, rotations=given))
    assert "1 rotations of" in plan_merge(base, experts, bound)["given"]["math"]
    assert plan_merge(base, experts, bound)["rotations"] == {}
    target = tmp_path / "out"
    merge(base, experts, bound, target)
    assert merge(base, experts, bound, target)["reused"]
    write(tmp_path / "math.safetensors", trio, "math", seed=7)
    with pytest.raises(ConfigError, match=r"other given\.math"):
        merge(base, experts, bound, target)


def test_under_another_method(trio, method, tmp_path):
    base, experts = trio
    files = {name: write(tmp_path / f"{name}.safetensors", trio, name, seed=i) for i, name in enumerate(experts)}
    lower = method("lie_sum", rotations=files)
    bound = method("spectrum_projection", of=lower.config)
    assert bound.rotation_files == files
    assert set(plan_merge(base, experts, bound)["given"]) == set(files)
    w0, below = base.read(Q), merge_state(base, experts, lower)[Q]
    expected = bound.function(w0, [expert.read(Q) for expert in experts.values()], merged=below, reference="base")
    torch.testing.assert_close(merge_state(base, experts, bound)[Q], expected)
    target = tmp_path / "out"
    merge(base, experts, bound, target)
    write(tmp_path / "math.safetensors", trio, "math", seed=7)
    with pytest.raises(ConfigError, match=r"other given\.math"):
        merge(base, experts, bound, target)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shape": (15, 15)}, "turns 15 dimensions, the tensor has 16"),
        ({"shape": (15, 16)}, r"is a frame of shape \[15, 16\], the tensor has \[16, 16\]"),
        ({"source": "math", "towards": "code"}, "not turn the base; .*it leads to them; learn one towards math"),
        ({"side": "left"}, f"'{Q}' is turned on both sides"),
    ],
)
def test_all_that_does_not_fit_is_named_at_once(changes, told, trio, method, tmp_path):
    files = {"code": write(tmp_path / "code.safetensors", trio, "code")}
    files["math"] = write(tmp_path / "math.safetensors", trio, "math", **changes)
    with pytest.raises(ConfigError, match=rf"merge\.rotations: .*{told}"):
        merge_state(*trio, method("lie_sum", rotations=files))


def test_whether_files_were_learned_from_samples(tmp_path):
    for objective, sampled in (("logits", True), ("activation", True), ("weights", False)):
        told = {"source": '{"model": "base"}', "objective": objective}
        save_rotations(tmp_path / "r.safetensors", {Q: Rotation(right=torch.eye(16))}, told)
        assert from_samples({"math": str(tmp_path / "r.safetensors")}) is sampled


def test_absent_files_and_files_of_deltas(trio, method, tmp_path):
    path = tmp_path / "delta.safetensors"
    save_rotations(path, {Q: Delta(torch.ones(16, 16))}, {"source": '{"model": "base"}'})
    files = {"math": str(tmp_path / "absent"), "code": str(path)}
    with pytest.raises(ConfigError, match=r"absent: rotations file does not exist.*; .*it holds no rotations"):
        merge_state(*trio, method("lie_sum", rotations=files))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("r.safetensors", "a map from expert to rotations.safetensors is expected"),
        ({"math": 1, "code": "r"}, "a map from expert to rotations.safetensors is expected"),
        ({"math": "r"}, "merge.rotations lacks expert 'code'"),
        ({"math": "r", "code": "r", "law": "r"}, "merge.rotations names 'law', the experts are math, code"),
    ],
)
def test_wrong_values_are_named(value, words, method):
    with pytest.raises(ConfigError, match=words):
        method("lie_sum", rotations=value)
