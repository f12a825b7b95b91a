"""What ships is what the manifest says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rotrl.errors import ConfigError
from rotrl.zoo import CHECKPOINTS, zoo_path
from rotrl.zoo.build import MANIFEST, hashes
from rotrl.zoo.model import make_tokenizer

NAMES = ("base", "math", "code", "math_sft", "code_sft")
EXPERIMENT = Path(__file__).parents[2] / "conf" / "experiment" / "build_zoo.yaml"
MATRIX = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")


@pytest.fixture(scope="module")
def manifest():
    return json.loads((CHECKPOINTS / MANIFEST).read_text())["checkpoints"]


@pytest.fixture(scope="module")
def base():
    return load_file(zoo_path("base") / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_files_match_the_manifest(manifest, name):
    assert hashes(zoo_path(name)) == manifest[name]["files"]


@pytest.mark.parametrize("name", NAMES[1:])
def test_experts_differ_from_their_base_in_the_matrices_alone(manifest, base, name):
    expert = load_file(zoo_path(name) / "model.safetensors")
    assert expert.keys() == base.keys()
    changed = {n for n in base if not expert[n].equal(base[n])}
    assert changed == {n for n in base if MATRIX.search(n)}
    assert manifest[name]["recipe"]["base"] == manifest["base"]["files"]["model.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_are_the_current_one(name):
    assert AutoTokenizer.from_pretrained(zoo_path(name)).get_vocab() == make_tokenizer().get_vocab()
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (zoo_path(name) / file).read_bytes() == (zoo_path("base") / file).read_bytes()


def test_recorded_accuracies_show_what_the_pair_is_for(manifest):
    def score(name, task):
        return manifest[name]["accuracy"][task]["accuracy"]

    assert score("math", "math") >= 0.75
    assert score("code", "code") >= 0.95
    assert score("math", "code") <= score("base", "code") + 0.1
    assert score("code", "math") <= score("base", "math") + 0.1
    assert score("math_sft", "math") >= 0.85
    assert score("code_sft", "code") >= 0.95
    assert all(0 < e["accuracy"][t]["standard_error"] < 0.03 for e in manifest.values() for t in ("math", "code"))


@pytest.mark.parametrize("name", NAMES)
def test_the_experiment_holds_the_recipe_of_what_ships(manifest, name):
    job: Any = OmegaConf.to_container(OmegaConf.load(EXPERIMENT).job)
    measured = {"seed": job["seed"], "problems": job["problems"], "samples_measured": job["samples"]}
    assert {k: v for k, v in manifest[name]["recipe"].items() if k != "base"} == job["stages"][name] | measured


def test_unknown_name_lists_the_others():
    with pytest.raises(ConfigError, match=r"'maths'.*base, code"):
        zoo_path("maths")
