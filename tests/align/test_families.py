"""Every family on the tiny random pair: its start, its end, its file and the merge that applies it."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotrl.align.deltas import Directions, Free, LowRank
from rotrl.align.family import Family
from rotrl.align.fit import cayley, coefficients, free, lora, low_rank, split, stiefel
from rotrl.align.low_rank import LowRankTurns
from rotrl.align.parametrization import CayleyTurns, Rotations
from rotrl.align.results import learned_file
from rotrl.checkpoint.rotations import Rotation, open_rotations
from rotrl.errors import CheckpointError, ConfigError
from rotrl.linalg.rotation import exp, log
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge_state

HYPER = {"steps": 8, "batch": 8, "checkpoint_every": 3}
START = {"_target_": "rotrl.merge.linear.task_arithmetic", "_partial_": True, "scale": 1.0}
LEARNED = {"_target_": "rotrl.merge.rotation.learned", "_partial_": True}
DELTAS = [lora, free, coefficients, split]
TURNS = [stiefel, cayley, low_rank]


def matrices() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"wide0": (8, 12), "wide1": (8, 12), "tall": (12, 8), "square": (8, 8)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def directions() -> dict[str, dict[str, Tensor]]:
    return {label: {name: torch.randn_like(w) for name, w in matrices().items()} for label in ("a", "b")}


FAMILIES: dict[str, Callable[[], Family]] = {
    "stiefel": lambda: Rotations(matrices()),
    "both": lambda: Rotations(matrices(), side="both"),
    "blocks": lambda: Rotations(matrices(), side="both", block=4),
    "cayley": lambda: CayleyTurns(matrices(), side="both"),
    "cayley blocks": lambda: CayleyTurns(matrices(), side="right", block=4),
    "low_rank": lambda: LowRankTurns(matrices(), rank=2, side="both"),
    "lora": lambda: LowRank(matrices(), rank=3),
    "free": lambda: Free(matrices()),
    "directions": lambda: Directions(matrices(), directions()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_begins_at_the_source_and_exports_what_it_gives(name: str):
    family = FAMILIES[name]()
    for key, weight in family().items():
        torch.testing.assert_close(weight, matrices()[key], rtol=0, atol=1e-14)
    assert float(family.prior().detach()) == pytest.approx(0, abs=1e-20)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in family.parameters():
            if isinstance(family, Rotations):
                a = 0.1 * torch.randn_like(part)
                part.copy_(exp(a - a.mT))
            else:
                part.add_(0.1 * torch.randn_like(part))
    adapted, exported = family(), family.export()
    assert adapted.keys() == exported.keys() == matrices().keys()
    for key, learned in exported.items():
        torch.testing.assert_close(learned.apply(matrices()[key]), adapted[key], rtol=0, atol=1e-12)
        assert not torch.allclose(adapted[key], matrices()[key], atol=1e-2)
        if isinstance(learned, Rotation):
            for matrix in (learned.left, learned.right):
                if matrix is not None:
                    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(len(matrix)).to(matrix))


def test_low_rank_turns_are_the_exponential_of_their_generator():
    family = LowRankTurns(matrices(), rank=2)
    with torch.no_grad():
        for part in family.parameters():
            part.add_(0.3 * torch.randn_like(part))
    for stack, names in enumerate(family.stacks):
        a, b = family.rotations[stack].detach().unbind(1)
        found = family.matrix(stack).detach()
        torch.testing.assert_close(found, exp(a @ b.mT - b @ a.mT), rtol=0, atol=1e-12)
        assert len(found) == len(names)


def test_blocks_are_zero_elsewhere_and_must_divide():
    family = Rotations(matrices(), side="right", block=4)
    with torch.no_grad():
        for part in family.parameters():
            a = torch.randn_like(part)
            part.copy_(exp(a - a.mT))
    whole = family.export()["wide0"].right
    assert whole is not None
    assert whole.shape == (12, 12)
    mask = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    assert (whole[~mask] == 0).all()
    assert (whole[mask] != 0).all()
    with pytest.raises(ConfigError, match=r"align\.block=5 does not divide the 12 dimensions of 'wide0'"):
        Rotations(matrices(), side="right", block=5)


@pytest.mark.parametrize("kind", [CayleyTurns, Rotations])
def test_the_first_step_of_both_optimisers_turns_by_lr(kind):
    """Rms angle of the first step on a random gradient; Adam's is lr where every entry of it counts alike."""
    import geoopt

    family = kind(matrices())
    optimizer = geoopt.optim.RiemannianAdam(family.groups(0.01))
    torch.stack([(torch.randn_like(w) * w).sum() for w in family().values()]).sum().backward()
    optimizer.step()
    assert float(family.rms_angle().detach()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("function", [*TURNS, *DELTAS])
def test_the_merge_learned_is_the_model_that_the_fit_ended_with(function, pair, call, tmp_path: Path, monkeypatch):
    base, experts, _ = pair
    ends: list[dict[str, Tensor]] = []
    import rotrl.align.learn as stage

    measure = stage.measure

    def spy(engine, module):
        found = measure(engine, module)
        ends.append({name: weight.detach().clone() for name, weight in module.adapted().items()})
        return found

    monkeypatch.setattr(stage, "measure", spy)
    summary = call(function, tmp_path, source="start", start=START, **HYPER)
    file = learned_file(tmp_path)
    assert file is not None
    assert file.name == summary["rotations"]
    assert file.name == ("deltas.safetensors" if function in DELTAS else "rotations.safetensors")
    merged = merge_state(base, experts, bind(LEARNED, list(experts)), file)
    start = merge_state(base, experts, bind(START, list(experts)))
    for name, weight in ends[-1].items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=2e-6)
        assert not torch.equal(weight, start[name])
    assert all(torch.equal(merged[name], start[name]) for name in merged.keys() - ends[-1].keys())
    before, after = (sum(summary[key].values()) for key in ("kl_before", "kl_after"))
    assert after < before
    assert summary["source"] == {"merge": START}
    assert summary["parametrization"] == function.__name__ == open_rotations(file).metadata["parametrization"]
    assert (summary["angle_rms"] is None) == (function in DELTAS)
    assert 0 < summary["change"] < 0.5


def test_coefficients_stand_in_the_table(call, pair, tmp_path: Path):
    base, experts, _ = pair
    call(coefficients, tmp_path, source="base", **HYPER)
    rows = list(csv.DictReader((tmp_path / "align.csv").open()))
    file = open_rotations(tmp_path / "deltas.safetensors")
    for row in rows:
        name = row["tensor"]
        expected = sum(float(row[k]) * (experts[k].read(name) - base.read(name)) for k in experts)
        torch.testing.assert_close(file.get(name).delta, expected, rtol=0, atol=1e-6)  # type: ignore[union-attr]


def test_an_interrupted_fit_of_deltas_continues(call, tmp_path: Path):
    call(lora, tmp_path / "whole", **HYPER)

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(lora, tmp_path / "parts", progress=stop, **HYPER)
    with pytest.raises(ConfigError, match=r"belongs to another alignment \(family was \"lora\", now \"free\""):
        call(free, tmp_path / "parts", **HYPER)
    call(lora, tmp_path / "parts", **HYPER)
    whole, parts = (open_rotations(tmp_path / name / "deltas.safetensors") for name in ("whole", "parts"))
    for name in whole.names:
        torch.testing.assert_close(whole.get(name).delta, parts.get(name).delta, rtol=0, atol=1e-5)  # type: ignore[union-attr]


def test_deltas_are_refused_where_rotations_are_needed(call, pair, tmp_path: Path):
    base, experts, _ = pair
    call(lora, tmp_path, source="math", teachers=["code"], **HYPER)
    aligned = bind({"_target_": "rotrl.merge.rotation.geodesic_aligned", "_partial_": True}, list(experts))
    with pytest.raises(ConfigError, match=r"merge=geodesic_aligned turns weights and .* holds no rotations"):
        merge_state(base, experts, aligned, tmp_path / "deltas.safetensors")


def test_deltas_of_another_shape_are_named(pair, tmp_path: Path):
    from rotrl.checkpoint.rotations import Delta, save_rotations

    base, experts, _ = pair
    name = "model.layers.0.self_attn.q_proj.weight"
    save_rotations(tmp_path / "d.safetensors", {name: Delta(torch.zeros(2, 3))}, {"source": '{"model": "base"}'})
    with pytest.raises(CheckpointError, match=r"'model.*\.delta' has shape \[2, 3\], the base has one of \[16, 16\]"):
        merge_state(base, experts, bind(LEARNED, list(experts)), tmp_path / "d.safetensors")


@pytest.mark.parametrize("function", [stiefel, lora])
def test_the_way_to_what_was_learned_can_be_walked(function, call, pair, tmp_path: Path):
    """At t = 0 the start, at t = 1 the end; rotations halve as rotations do, deltas as vectors."""
    base, experts, _ = pair
    call(function, tmp_path, source="start", start=START, lr=0.02, **HYPER)
    file = learned_file(tmp_path)
    state = {t: merge_state(base, experts, bind({**LEARNED, "t": t}, list(experts)), file) for t in (0.0, 0.5, 1.0)}
    start = merge_state(base, experts, bind(START, list(experts)))
    opened = open_rotations(tmp_path / file.name)  # type: ignore[union-attr]
    for name in opened.names:
        torch.testing.assert_close(state[0.0][name], start[name], rtol=0, atol=1e-6)
        found = opened.get(name)
        assert found is not None
        torch.testing.assert_close(state[1.0][name], found.apply(start[name]), rtol=0, atol=1e-6)
        middle = (start[name] + state[1.0][name]) / 2
        if not isinstance(found, Rotation):
            torch.testing.assert_close(state[0.5][name], middle, rtol=0, atol=1e-6)
            continue
        r = found.left if found.right is None else found.right
        half = exp(log(r.double()) / 2)  # type: ignore[union-attr]
        turned = half @ start[name].double() if found.right is None else start[name].double() @ half
        torch.testing.assert_close(state[0.5][name].double(), turned, rtol=0, atol=1e-6)
        assert torch.linalg.matrix_norm(state[0.5][name] - middle) > 1e-6
