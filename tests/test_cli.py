"""`python -m rotrl` as a stranger types it: exit codes, one line per mistake, nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotrl.zoo import zoo_path

QUIET = ("evidence=none", "align=none", "evaluation=none", "logger=none")


def rotrl(folder: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rotrl", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


def custom(**experts: Path) -> list[str]:
    given = ", ".join(f"{name}: {path}" for name, path in experts.items())
    return ["models=custom", f"models.base={zoo_path('base')}", f"models.experts={{{given}}}", *QUIET]


def refused(folder: Path, *arguments: str) -> str:
    """The line of a run that must be refused and must leave nothing behind."""
    before = sorted(folder.rglob("*"))
    done = rotrl(folder, *arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert sorted(folder.rglob("*")) == before
    return lines[0]


def test_help_names_groups_and_examples(tmp_path: Path) -> None:
    done = rotrl(tmp_path, "--help")
    assert done.returncode == 0
    for text in ("python -m rotrl plan_only=true", "merge: ", "experiment: ", "merge_scale: 1.0"):
        assert text in done.stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys
import rotrl.__main__ as program
sys.argv = ["rotrl", "--help"]
try:
    program.main()
except SystemExit:
    print("LOADED", sorted({"torch", "transformers", "vllm", "wandb", "matplotlib", "scipy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("LOADED []"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge_scael=1"], ["merge_scael", "merge_scale"]),
        (["merge=tyes"], ["tyes", "ties"]),
        (["merge=ties", "merge.denisty=0.3"], ["merge.denisty", "density"]),
        ([*QUIET, "merge=ties", "merge.density=30"], ["density", "30"]),
        ([*QUIET, "merge=ties", "+merge.denisty=0.3"], ["denisty", "density"]),
        ([*QUIET, "merge=learned"], ["learned", "align"]),
        ([*QUIET, "merge=ties", "models.base=/absent/model"], ["base", "/absent/model"]),
        (["+align.stepz=3"], ["align.stepz", "steps"]),
        (["+evidence.geometry.bootstrp=3"], ["evidence.geometry.bootstrp", "bootstrap"]),
        (["evidence=full", "evidence.function.side=both"], ["evidence.function.side", "one of small, left, right"]),
        (["merge=geodesic_aligned"], ["geodesic_aligned", "align.source=math"]),
        (["models=custom", *QUIET, "merge=none"], ["models.base"]),
        (["models=custom", "models.base=x"], ["models.experts is empty", "merge=none"]),
        (["evaluation=custom", "evaluation.path=/absent.jsonl"], ["/absent.jsonl"]),
        (["protocol.n=1"], ["pass@8", "n=1", "protocol.ks=[1]"]),
        (["protocol.max_tokens=9999"], ["256 tokens", "tiny_math", "protocol.max_tokens=245"]),
        (["evaluation.select=[tiny_mth]"], ["evaluation.select", "tiny_mth", "tiny_math"]),
        (["regrade=/absent"], ["/absent", "record.json"]),
        (["verify=/absent"], ["/absent"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    line = refused(tmp_path, *arguments)
    assert all(word in line for word in words), line


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    shutil.copytree(zoo_path("math"), tmp_path / "math")
    weights = tmp_path / "math/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(weights) in refused(tmp_path, *custom(math=tmp_path / "math"), "merge=linear")


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        ("{{ bos_token }}{{ bos_token }}{{ messages[0].content }}", [], ["'p'", "has 2 BOS tokens"]),
        (None, [], ["no chat template"]),
        ("{{ messages[0].content }}", ["protocol.max_tokens=252"], ["context of 256", "'p'", "max_tokens=2"]),
        ("{{ messages[0].content }}", ["+engine.max_num_seq=1"], ["engine.max_num_seq", "did you mean 'max_num_seqs'"]),
    ],
)
def test_what_cannot_be_asked_of_the_models_is_refused_before_any_stage(
    tmp_path: Path, template: str | None, settings: list[str], words: list[str]
) -> None:
    base, problems = tmp_path / "base", tmp_path / "own.jsonl"
    shutil.copytree(zoo_path("base"), base)
    (base / "chat_template.jinja").unlink()
    if template is not None:
        (base / "chat_template.jinja").write_text(template)
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "<|endoftext|>"}))
    problems.write_text('{"id": "p", "prompt": "math:1+1=", "answer": "2"}\n')
    models = ["models=custom", f"models.base={base}", f"models.experts={{math: {zoo_path('math')}}}", "logger=none"]
    asked = ["evaluation=custom", f"evaluation.path={problems}", *settings]
    line = refused(tmp_path, *models, "align=none", "merge=linear", *asked)
    assert all(word in line for word in words), line


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    shutil.copytree(zoo_path("math"), tmp_path / "wide")
    weights = tmp_path / "wide/model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(8, tensors[name].shape[1])
    save_file(tensors, weights, metadata={"format": "pt"})
    line = refused(tmp_path, *custom(wide=tmp_path / "wide"), "merge=linear")
    assert name in line
    assert "wide" in line


def test_a_real_experiment_without_its_models_says_how_to_give_them(tmp_path: Path) -> None:
    line = refused(tmp_path, "+experiment=merge_justrl_archer")
    assert "hbx/JustRL-DeepSeek-1.5B" in line
    assert "models.root=DIR" in line


@pytest.mark.parametrize("experiment", ["align_deepscaler_deepcoder", "merge_justrl_archer", "rotation_evidence"])
def test_a_plan_needs_no_models_and_touches_nothing(tmp_path: Path, experiment: str) -> None:
    done = rotrl(tmp_path, f"+experiment={experiment}", "plan_only=true")
    assert done.returncode == 0, done.stderr
    assert "not here yet" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_plan_of_the_demo_shows_what_it_would_take(tmp_path: Path) -> None:
    done = rotrl(tmp_path, "plan_only=true")
    assert done.returncode == 0, done.stderr
    for text in ("tiny_math", "smallest visible", "learned", "geometry", "GB free"):
        assert text in done.stdout
    assert not list(tmp_path.iterdir())


def test_one_merge_is_written_verified_and_not_made_twice(tmp_path: Path) -> None:
    arguments = [*QUIET, "merge=task_arithmetic", "merge_scale=0.7", "output=out/merged", "run_dir=out/run"]
    first = rotrl(tmp_path, *arguments)
    assert first.returncode == 0, first.stderr
    weights = {name: load_file(zoo_path(name) / "model.safetensors") for name in ("base", "math", "code")}
    merged = load_file(tmp_path / "out/merged/model.safetensors")
    for name, base in weights["base"].items():
        expected = base + 0.7 * (weights["math"][name] - base + weights["code"][name] - base)
        torch.testing.assert_close(merged[name], expected)
    assert rotrl(tmp_path, "verify=out/merged").returncode == 0
    written = (tmp_path / "out/merged/model.safetensors").stat().st_mtime_ns
    second = rotrl(tmp_path, *arguments)
    assert "done before" in second.stdout
    assert (tmp_path / "out/merged/model.safetensors").stat().st_mtime_ns == written
    record = json.loads((tmp_path / "out/run/record.json").read_text())
    assert record["status"] == "done"
    assert record["merges"]["task_arithmetic"]["effective_coefficient"] == pytest.approx(0.7, abs=1e-3)


def test_a_folder_that_holds_another_run_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    arguments = [*QUIET, "merge=linear", "run_dir=run"]
    assert rotrl(tmp_path, *arguments).returncode == 0
    assert "seed" in refused(tmp_path, *arguments, "seed=1")


def test_a_failed_job_leaves_the_others_running(tmp_path: Path) -> None:
    done = rotrl(tmp_path, "-m", *QUIET, "merge=linear,learned,ties")
    assert done.returncode == 2
    assert "learned" in done.stderr.strip().splitlines()[-1]
    statuses = [json.loads(p.read_text())["status"] for p in sorted((tmp_path / "multirun/demo").glob("*/record.json"))]
    assert statuses == ["done", "done"]
    assert "ties" in done.stdout


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    assert rotrl(tmp_path, *QUIET, "merge=linear", "output=merged").returncode == 0
    weights = tmp_path / "merged/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    done = rotrl(tmp_path, "verify=merged")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr


def test_doctor_says_which_sandbox_holds(tmp_path: Path) -> None:
    done = rotrl(tmp_path, "doctor=true")
    assert done.returncode == 0, done.stderr
    assert "landlock" in done.stdout


@pytest.mark.slow
def test_edited_problems_are_not_answered_by_an_old_run(tmp_path: Path) -> None:
    arguments = ["evidence=none", "align=none", "merge=none", "logger=none", "protocol.n=2", "protocol.ks=[1]"]
    arguments += ["evaluation=custom", "evaluation.path=problems.jsonl"]
    runs = []
    for answer in ("9", "8"):
        row = {"id": "1", "prompt": "math:(3+4)*2-5=", "answer": answer}
        (tmp_path / "problems.jsonl").write_text(json.dumps(row))
        done = rotrl(tmp_path, *arguments, timeout=300)
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout)
    assert not any("done before, nothing to do" in out for out in runs)
    assert "6 samples generated" in runs[0]
    assert "0 samples generated, 6 reused" in runs[1]  # the answers are the same, their verdicts are not


def test_an_interruption_of_generated_code_has_its_exit_code_too(tmp_path):
    """CPython remembers one that fell into an exec of text, as dataclasses do, and ends by SIGINT."""
    (tmp_path / "interrupted.py").write_text(
        "import hydra\n"
        "hydra.main = lambda **_: lambda task: lambda: exec('raise KeyboardInterrupt')\n"
        "from rotrl.__main__ import main\n"
        "main()\n"
    )
    process = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 130, process.stderr
    assert "the same command continues" in process.stderr
