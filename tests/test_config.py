"""Every shipped preset composes; every choice has a file; a wrong word is one line that names the right one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from rotrl import config
from rotrl.errors import ConfigError
from rotrl.merge.bind import bind

CONF = Path(config.config_dir())
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GROUPS = ("align", "engine", "evaluation", "evidence", "logger", "merge", "models", "protocol", "trainer")
CHOICES = sorted((group, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml"))
FREE = {  # what a preset leaves to the user
    "models=custom": ["models.base=DIR", "models.experts={math: DIR}"],
    "models=deepscaler_deepcoder": ["models.prompts.math=a.jsonl", "models.prompts.code=b.jsonl"],
    "evaluation=custom": ["evaluation.path=problems.jsonl"],
}


def resolved(*overrides: str) -> dict:
    settings = OmegaConf.to_container(config.compose(overrides), resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return settings


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    assert resolved(f"+experiment={experiment}")["name"] == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_how_to_run_it(experiment: str) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert re.search(rf"^# python -m rotrl \+experiment={experiment}\b", text, re.MULTILINE)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group: str, choice: str) -> None:
    override = f"{group}={choice}"
    assert resolved(override, *FREE.get(override, []))["name"] == "demo"


def test_every_single_method_is_in_a_yaml_of_its_name() -> None:
    for path in (CONF / "merge").glob("*.yaml"):
        node = yaml.safe_load(path.read_text()) or {}
        if "_target_" in node:
            assert node["_target_"].rsplit(".", 1)[-1] == path.stem


def test_the_suite_has_eight_merges_and_the_learned_one() -> None:
    suite = resolved()["merge"]
    assert len(suite) >= 8
    assert "learned" in suite


def test_merge_scale_is_the_lambda_of_every_task_vector_method() -> None:
    suite = resolved("merge_scale=0.3")["merge"]
    assert suite["task_arithmetic"]["scale"] == 0.3
    assert suite["ties"]["scale"] == 0.3


def test_merge_scale_may_be_a_rule_and_a_method_may_lie_under_another() -> None:
    merge = resolved("merge=svc", "merge@merge.of=ties", "merge_scale=norm")["merge"]
    assert merge["of"]["scale"] == "norm"
    assert bind(merge, ["math", "code"]).of is not None
    with pytest.raises(ConfigError, match=r"merge\.of\.scale is 'large', a number or one of mean, norm"):
        bind(resolved("merge=svc", "merge@merge.of=ties", "merge_scale=large")["merge"], ["math", "code"])


def test_parameters_per_layer() -> None:
    merge = resolved("merge=ties", "merge.per_layer={density: [0.1, 0.5], scale: {q: 0.7, norm: mean}}")["merge"]
    assert bind(merge, ["math", "code"]).per_layer == {"density": [0.1, 0.5], "scale": {"q": 0.7, "norm": "mean"}}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["merge=tyes"], "unknown merge 'tyes', did you mean 'ties'?; one of: "),
        (["merge=ties", "merge.denisty=.3"], "unknown key 'merge.denisty', did you mean 'density'?; one of: "),
        (["merge_scael=1"], "unknown key 'merge_scael', did you mean 'merge_scale'?; one of: "),
        (["merge.ties.densty=1"], "unknown key 'merge.ties.densty', did you mean 'density'?; one of: "),
        (["+experiment=align_deepscaler"], "unknown experiment 'align_deepscaler', did you mean 'align_deepscaler_"),
    ],
)
def test_a_wrong_word_is_one_line_that_names_the_right_one(overrides: list[str], line: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        config.compose(overrides)
    said = config.user_error(caught.value, overrides)
    assert said is not None
    assert line in said
    assert "\n" not in said


def test_a_bug_is_not_taken_for_the_users_mistake() -> None:
    assert config.user_error(ZeroDivisionError("x"), []) is None


def test_memory_that_runs_out_is_no_bug() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    said = config.user_error(caught.value, [])
    assert said is not None
    assert said.startswith("memory ran out (")


def test_conf_is_found_inside_the_package_as_a_wheel_has_it(tmp_path: Path) -> None:
    package = Path(config.__file__).parent
    (tmp_path / "rotrl/evaluate").mkdir(parents=True)
    for name in ("__init__.py", "config.py", "errors.py", "values.py", "evaluate/__init__.py", "evaluate/sampling.py"):
        shutil.copy(package / name, tmp_path / "rotrl" / name)
    shutil.copytree(CONF, tmp_path / "rotrl/conf")
    script = "from rotrl import config; print(config.config_dir()); print(config.compose(['merge=ties']).merge.density)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "rotrl/conf"), "0.2"]
