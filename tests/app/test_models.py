"""Models are found as folders, below models.root, or on the hub; what is missing is said in one line."""

import shutil
from pathlib import Path

import pytest
import torch

from rotrl.app.models import locate, locate_all, open_models, open_others
from rotrl.app.provenance import model_facts
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.errors import CheckpointError, RotrlError
from rotrl.zoo import zoo_path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert locate("base", str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("layout", ["DeepScaleR", "agentica-org/DeepScaleR"])
def test_root_holds_hub_models_by_name(tmp_path: Path, layout: str) -> None:
    (tmp_path / layout).mkdir(parents=True)
    assert locate("base", "agentica-org/DeepScaleR", str(tmp_path)) == (tmp_path / layout).resolve()


@pytest.mark.parametrize("layout", ["model", "org/model"])
def test_a_folder_of_root_stands_for_no_revision(tmp_path: Path, layout: str) -> None:
    (tmp_path / layout).mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        locate("experts.math", "org/model@0123abcd", str(tmp_path))
    told = f"{tmp_path / layout} stands for org/model whatever its revision, and 0123abcd is asked"
    assert str(caught.value) == f"experts.math: {told}; leave out @0123abcd or give the folder of that revision"
    with pytest.raises(CheckpointError, match="neither in the hub's cache"):
        locate("experts.math", "org/other@0123abcd", str(tmp_path))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base: no folder '.*/absent'; give one that holds config.json"):
        locate("base", str(tmp_path / "absent"))


def test_a_hub_model_that_is_not_here_says_how_to_give_it() -> None:
    with pytest.raises(CheckpointError, match=r"org/model is neither in the hub's cache .* models.root=DIR .*model/"):
        locate("base", "org/model")


def test_every_missing_model_is_named_at_once() -> None:
    with pytest.raises(CheckpointError) as error:
        locate_all({"base": "/absent/a", "experts": {"math": "/absent/b", "code": "/absent/c"}})
    assert all(name in str(error.value) for name in ("/absent/a", "/absent/b", "/absent/c"))
    assert "\n" not in str(error.value)


def test_choices_reach_the_models_and_controls_are_checked_like_experts(tensors, save) -> None:
    weights = tensors(0)
    longer = {**weights, "model.embed_tokens.weight": torch.ones(36, 16)}
    paths = {"base": save("base", weights), "math": save("math", longer), "control": save("control", weights)}
    models = {"base": str(paths["base"]), "experts": {"math": str(paths["math"])}}
    cfg = {"models": models, "tokenizer_from": None, "vocab": "pad", "lm_head": "error", "nonfinite": "error"}
    base, experts, controls = open_models(cfg)
    assert base.config["vocab_size"] == experts["math"].config["vocab_size"] == 36
    assert controls == {}
    models["controls"] = {"sft": str(paths["control"])}
    with pytest.raises(CheckpointError) as error:
        open_models({**cfg, "vocab": "error"})
    assert "embed_tokens.weight' has shape [36, 16], base has [32, 16]" in str(error.value)
    models["controls"] = {"math": str(paths["control"])}
    with pytest.raises(CheckpointError, match=r"models.controls.math has an expert's name"):
        open_models(cfg)


def test_a_model_of_the_hub_is_recorded_with_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--model" / "snapshots" / "0123abcd"
    shutil.copytree(zoo_path("base"), folder)
    found = model_facts(open_checkpoint(folder))
    assert found["repository"] == "org/model"
    assert found["revision"] == "0123abcd"
    assert "revision" not in model_facts(open_checkpoint(zoo_path("base")))


def other_pairs(**pairs):
    cfg = {"models": {"experts": {"math": "x"}}, "evidence": {"geometry": {"others": pairs}}}
    return cfg | {"tokenizer_from": None, "vocab": "error", "lm_head": "error", "nonfinite": "error"}


def test_a_model_of_another_base_comes_with_its_base() -> None:
    pair = {"base": str(zoo_path("math")), "tuned": str(zoo_path("code"))}
    base, tuned = open_others(other_pairs(dapo=pair))["dapo"]
    assert (base.path, tuned.path) == (zoo_path("math"), zoo_path("code"))
    assert open_others(other_pairs() | {"evidence": {"lineage": True}}) == {}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"dapo": {"base": "DIR"}}, r"evidence.geometry.others.dapo is {'base': 'DIR'}; give {base: DIR, tuned: DIR}"),
        ({"math": {"base": "a", "tuned": "b"}}, "others.math has the name of an expert or a control; rename it"),
        ({"dapo": {"base": "/absent", "tuned": "b"}}, "evidence.geometry.others.dapo.base: no folder '/absent'"),
    ],
)
def test_wrong_pairs_of_other_bases_are_one_line(pairs, message) -> None:
    with pytest.raises(RotrlError, match=message):
        open_others(other_pairs(**pairs))
