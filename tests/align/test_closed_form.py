import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotrl.align.closed_form import procrustes
from rotrl.align.parametrization import Rotations
from rotrl.align.sharing import side_of
from rotrl.align.source import Problem, pose, refuse_reflections
from rotrl.checkpoint.reader import Checkpoint, open_checkpoint
from rotrl.checkpoint.rotations import Rotation, open_rotations
from rotrl.errors import NumericsError
from rotrl.linalg.rotation import exp


def closed_form(problem: Problem, *, side: str, anchor: float) -> dict[str, Rotation]:
    family = Rotations(problem.matrices, side=side)
    found = family.closed_form(problem.terms, anchor=anchor)
    assert found is not None
    return family.by_tensor(found)


def save_double(base: Checkpoint, weights: dict[str, Tensor], folder: Path) -> Checkpoint:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text((base.path / "config.json").read_text())
    save_file(
        {name: weights.get(name, base.read(name).double()) for name in base.tensors}, folder / "model.safetensors"
    )
    return open_checkpoint(folder)


@pytest.mark.parametrize("angle", [0.001, 0.3, 2.0])
@pytest.mark.parametrize("side", ["small", "right"])
def test_planted_rotations_come_back(pair, tmp_path: Path, angle: float, side: str):
    base = pair[0]
    source = pose(base, {"e": base}, source="base", start=None, teachers="all")
    planted, turned = {}, {}
    for seed, (name, weight) in enumerate(source.matrices.items()):
        acts = "left" if side == "small" and weight.shape[0] < weight.shape[1] else "right"
        n = weight.shape[0] if acts == "left" else weight.shape[1]
        if n > min(weight.shape):
            continue  # a rotation of the wide side is not unique
        a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        planted[name] = exp((a - a.mT) * angle / torch.linalg.matrix_norm(a - a.mT, 2))
        turned[name] = Rotation(**{acts: planted[name]}).apply(weight.double())
    expert = save_double(base, turned, tmp_path / "expert")
    found = closed_form(pose(base, {"e": expert}, source="base", start=None, teachers="all"), side=side, anchor=0.0)
    assert len(planted) > 5
    for name, truth in planted.items():
        rotation = getattr(found[name], side_of(source.state[name].shape, side))
        assert (rotation - truth).abs().max() < 1e-8


def test_files_and_summary(call, tmp_path: Path):
    summary = call(procrustes, tmp_path, source="math", teachers=["code"])
    file = open_rotations(tmp_path / "rotations.safetensors")
    assert file.source == summary["source"] == {"expert": "math"}
    assert file.metadata["teachers"] == '["code"]'
    assert file.metadata["parametrization"] == "procrustes"
    assert 0 < summary["explained"] < 1
    assert set(summary["kl_before"]) == set(summary["kl_after"]) == {"code"}
    rows = list(csv.DictReader((tmp_path / "align.csv").open()))
    assert {row["tensor"] for row in rows} == set(file.names)
    assert all(0 < float(row["explained"]) < 1 for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["align.csv", "rotations.safetensors"]


def test_without_rollouts_no_model_runs(call, tmp_path: Path):
    summary = call(procrustes, tmp_path, rollouts=None)
    assert summary["kl_before"] == summary["kl_after"] == {}


def test_no_random_orthogonal_step_brings_the_source_nearer(pair):
    base, experts, _ = pair
    problem = pose(base, experts, source="base", start=None, teachers="all")
    found = closed_form(problem, side="small", anchor=0.0)
    torch.manual_seed(0)
    for name, rotation in found.items():
        source, target = problem.state[name].double(), problem.target(name)
        best = (rotation.apply(source) - target).norm()
        acts = side_of(source.shape, "small")
        for size in (1e-3, 1e-1):
            a = size * torch.randn_like(getattr(rotation, acts))
            moved = Rotation(**{acts: exp(a - a.mT) @ getattr(rotation, acts)})
            assert (moved.apply(source) - target).norm() > best


def test_a_reflection_is_refused_by_name(pair, tmp_path: Path):
    base = pair[0]
    name = "model.layers.0.self_attn.q_proj.weight"
    mirror = torch.ones(16, dtype=torch.float64)
    mirror[0] = -1
    expert = save_double(base, {name: base.read(name).double() * mirror}, tmp_path / "expert")
    problem = pose(base, {"expert": expert}, source="base", start=None, teachers="all")
    with pytest.raises(NumericsError, match=rf"^{name}: the Procrustes solution is a reflection"):
        refuse_reflections(closed_form(problem, side="small", anchor=0.0))
    refuse_reflections(
        closed_form(pose(base, {"e": base}, source="base", start=None, teachers="all"), side="small", anchor=0)
    )
