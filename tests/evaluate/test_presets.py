"""The presets of benchmarks and protocols, and how a multirun is launched, composed by Hydra from `conf/`."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from rotrl import config
from rotrl.evaluate import published
from rotrl.evaluate.sampling import Sampling, samples_per_problem

CONF = Path(config.config_dir())
TASKS = {
    "math": ["aime24", "aime25", "math500", "amc23", "minerva", "olympiad"],
    "code": ["livecodebench", "humaneval", "mbpp"],
}
TASKS["full"] = TASKS["math"] + TASKS["code"]
PUBLISHED = ["archer", "deepcoder", "deepscaler", "open_r1", "prorl", "sober_look", "transferability"]


def composed(name: str, *overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=True)  # pyright: ignore


def whole(*overrides: str) -> dict:
    """The part of the program's own configuration that an evaluation reads."""
    found = config.compose(overrides)
    return {key: OmegaConf.to_container(found[key], resolve=True) for key in ("evaluation", "protocol")}


@pytest.mark.parametrize("preset", TASKS)
def test_a_preset_names_its_tasks_and_pins_their_revisions(preset):
    tasks = composed(f"evaluation/{preset}")["evaluation"]["tasks"]
    assert list(tasks) == TASKS[preset]
    for name, node in tasks.items():
        assert node["_target_"].rpartition(".")[2] == name
        assert len(node["revision"]) == 40
        assert node["problems"] > 0


@pytest.mark.parametrize("name", TASKS["full"])
def test_a_node_shows_every_setting_with_the_functions_default(name):
    """What a user can override is on the screen of `--cfg job`, and a misspelt key is refused before anything runs."""
    node = composed("evaluation/full")["evaluation"]["tasks"][name]
    function = get_method(node.pop("_target_"))
    defaults = {key: value.default for key, value in inspect.signature(function).parameters.items()}
    assert node == {key: defaults[key] for key in node}
    assert defaults.keys() - node.keys() <= {"name", "files"}


@pytest.mark.parametrize("protocol", ["default", *PUBLISHED])
def test_a_protocol_fixes_its_sampling_and_has_an_n_for_every_task(protocol):
    found = whole("evaluation=full", f"protocol={protocol}")
    settings, tasks = found["protocol"], found["evaluation"]["tasks"]
    assert settings["name"] == ("rotrl" if protocol == "default" else protocol)
    assert settings["top_k"] == -1  # one way to say "all tokens": samples are kept by their settings
    assert Sampling.of(settings).max_tokens == 32768
    ns = [samples_per_problem(settings, name) for name in tasks]
    assert max(settings["ks"]) <= max(ns)
    assert settings["grader"] is None or published.rule(settings["grader"])
    for name, node in tasks.items():
        kind = "code" if name in TASKS["code"] else "math"
        assert node["prompt"] == (settings.get("prompts") or {}).get(kind)


@pytest.mark.parametrize("protocol", ["default", *PUBLISHED])
def test_every_value_of_a_protocol_can_be_set(protocol):
    changes = ["n.math500=2", "ks=[1]", "temperature=1", "top_p=0.5", "max_tokens=10", "grader=archer", "top_k=20"]
    changes += ["prompts.math='{problem} Box it.'"]
    found = whole("evaluation=full", f"protocol={protocol}", "seed=7", *(f"protocol.{change}" for change in changes))
    settings, tasks = found["protocol"], found["evaluation"]["tasks"]
    assert samples_per_problem(settings, "math500") == 2
    assert samples_per_problem(settings, "aime24") > 2
    assert (settings["ks"], settings["grader"]) == ([1], "archer")
    assert Sampling.of(settings) == Sampling(temperature=1, top_p=0.5, top_k=20, max_tokens=10)
    assert tasks["olympiad"]["prompt"] == "{problem} Box it."
    assert whole(f"protocol={protocol}", "protocol.n=3")["protocol"]["n"] == 3


def test_a_protocols_prompt_reaches_the_problems(tmp_path):
    node = whole("evaluation=full", "protocol=deepscaler")["evaluation"]["tasks"]["aime25"]
    file = tmp_path / "aime25.jsonl"
    file.write_text('{"id": "0", "problem": "What is {x}?", "answer": "1"}')
    (problem,) = instantiate({**node, "path": str(file), "problems": 1}).problems
    assert problem.prompt == "What is {x}? Let's think step by step and output the final answer within \\boxed{}."


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A program of two lines with the launchers and sweeps of this project."""
    for group in ("launcher", "sweep"):
        shutil.copytree(CONF / group, tmp_path / "conf" / group)
    (tmp_path / "conf" / "config.yaml").write_text(
        "defaults: [{launcher: local}, _self_]\nmerge_scale: 1.0\nhydra: {run: {dir: .}, output_subdir: null}\n"
    )
    (tmp_path / "app.py").write_text(
        "import hydra, os\n"
        "@hydra.main(config_path='conf', config_name='config', version_base='1.3')\n"
        "def main(cfg): print('job', cfg.merge_scale, os.getpid())\n"
        "main()\n"
    )
    return tmp_path


def run(app: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "app.py", *arguments], cwd=app, capture_output=True, text=True, timeout=60)


def jobs(app: Path, *arguments: str) -> list[list[str]]:
    done = run(app, *arguments)
    assert done.returncode == 0, done.stderr
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("job ")]


def test_a_sweep_preset_runs_its_values_in_one_process_and_the_command_line_goes_before_it(app):
    found = jobs(app, "+sweep=merge_scale")
    assert [scale for scale, _ in found] == ["0.3", "0.5", "0.65", "0.8", "1.0", "1.3"]
    assert len({process for _, process in found}) == 1
    assert [scale for scale, _ in jobs(app, "+sweep=merge_scale", "merge_scale=0.7")] == ["0.7"]
    assert [scale for scale, _ in jobs(app)] == ["1.0"]


def test_slurm_takes_single_runs_too_and_shows_its_settings(app):
    shown = run(app, "launcher=slurm", "hydra.launcher.partition=gpu", "--cfg", "hydra")
    launcher = yaml.safe_load(shown.stdout)["hydra"]["launcher"]
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher["partition"], launcher["gpus_per_node"], launcher["max_num_timeout"]) == ("gpu", 1, 3)
    assert yaml.safe_load(shown.stdout)["hydra"]["mode"] == "MULTIRUN"
