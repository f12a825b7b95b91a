"""Merges of a trio in which one expert was trained from the other, from the configuration down."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotrl.app import descent, pipeline
from rotrl.app.prepare import prepare
from rotrl.config import compose
from rotrl.errors import ConfigError
from rotrl.evidence.consequences import FAMILIES
from rotrl.zoo import zoo_path

ONLY = ("align=none", "evaluation=none", "logger=none", "evidence=lineage", "merge=task_arithmetic", "dtype=float32")


@pytest.fixture
def trio(tmp_path: Path) -> list[str]:
    """models.*: the zoo's mathematician, and a child of it that learned what the zoo's programmer learned."""
    import shutil

    base, math, code = (load_file(f"{zoo_path(name)}/model.safetensors") for name in ("base", "math", "code"))
    child = shutil.copytree(zoo_path("code"), tmp_path / "child")
    state = {name: math[name] + (code[name] - base[name]) for name in base}
    save_file(state, child / "model.safetensors", metadata={"format": "pt"})
    return [
        "models=custom",
        f"models.base={zoo_path('base')}",
        f"models.experts={{math: {zoo_path('math')}, code: {child}}}",
    ]


def config(*overrides: str) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose(list(overrides)), resolve=True)  # type: ignore[return-value]


def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[dict, dict[str, torch.Tensor]]:
    monkeypatch.chdir(tmp_path)
    record = pipeline.run(config(*ONLY, *overrides), None, "test")
    return record, load_file(Path(record["merges"]["task_arithmetic"]["path"]) / "model.safetensors")


def test_a_descendant_is_warned_of_and_rebased_on_request(trio, tmp_path, monkeypatch) -> None:
    record, twice = merged(tmp_path, monkeypatch, *trio)
    assert record["lineage"]["verdict"] == "descendant"
    assert any(text.startswith("merge task_arithmetic: counts math's update twice") for text in record["warnings"])
    asked, once = merged(tmp_path, monkeypatch, *trio, "models.rebase=true")
    _, same = merged(tmp_path, monkeypatch, *trio, "models.rebase={code: math}", "evidence=none")
    siblings, expected = merged(tmp_path, monkeypatch)
    assert siblings["lineage"]["verdict"] == "siblings"
    assert siblings["warnings"] == []
    assert asked["warnings"] == ["merges take code - math as the task vector of code (models.rebase)"]
    assert asked["digest"] != record["digest"]
    for name, tensor in expected.items():
        torch.testing.assert_close(once[name], tensor, rtol=1e-5, atol=1e-5)
        assert torch.equal(once[name], same[name])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (twice[name] - expected[name]).norm() > 0.5 * (twice[name] - once[name]).norm() > 0


def test_experts_of_one_base_are_in_its_gauge(tmp_path, monkeypatch) -> None:
    """The negative control: aligning gauges brings siblings no nearer, as there is nothing to align."""
    record, moved = merged(tmp_path, monkeypatch, "models.canonicalize=true")
    _, plain = merged(tmp_path, monkeypatch)
    base = load_file(f"{zoo_path('base')}/model.safetensors")
    assert any("canonicalize" in text for text in record["warnings"])
    change = sum(float((moved[name] - plain[name]).square().sum()) for name in base) ** 0.5
    update = sum(float((plain[name] - base[name]).square().sum()) for name in base) ** 0.5
    assert 0 < change < 0.5 * update
    assert json.loads((Path(record["merges"]["task_arithmetic"]["path"]) / "rotrl_manifest.json").read_text())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["models.rebase=true", "evidence=none"], "models.rebase=true asks the lineage"),
        (["models.rebase={code: maths}"], "models.rebase: no expert 'maths'; one of: math, code"),
        (["models.rebase={code: code}"], "'code' can't descend from itself"),
        (["models.rebase=yes please"], "true, false or {CHILD: PARENT} is expected"),
    ],
)
def test_a_rebase_that_can_t_be_followed_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare(config(*ONLY, *overrides))


def test_the_nearest_ancestor_is_the_parent() -> None:
    def pair(parent: str, child: str, distance: float) -> dict:
        return {"verdict": "descendant", "parent": parent, "child": child, "norm_ab": distance}

    chain = [pair("a", "b", 1.0), pair("a", "c", 1.4), pair("b", "c", 1.0), {"verdict": "siblings"}]
    assert descent.parents(chain) == {"b": "a", "c": "b"}


def test_a_path_from_parent_to_child_assumes_nothing() -> None:
    align = ("align=procrustes", "align.source=math", "align.teachers=[code]")
    methods = prepare(config(*ONLY, *align, "merge=path")).methods
    told = descent.warnings({"verdict": "descendant", "consequences": dict.fromkeys(FAMILIES, "twice")}, methods)
    assert told == ["merge task_arithmetic: twice", "merge linear: twice"]
    assert descent.warnings({"verdict": "siblings", "consequences": {}}, methods) == []
