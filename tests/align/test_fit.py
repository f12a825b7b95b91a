import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rotrl.align.data import read_rollouts, split
from rotrl.align.fit import stiefel
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.rotations import Rotation, open_rotations
from rotrl.errors import CheckpointError, ConfigError
from rotrl.linalg.rotation import exp
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge_state

HYPER = {"steps": 12, "batch": 8, "lr": 2e-3, "checkpoint_every": 3}


def rotations_of(out: Path) -> dict[str, torch.Tensor]:
    file = open_rotations(out / "rotations.safetensors")
    found = {}
    for name in file.names:
        rotation = file.get(name)
        assert isinstance(rotation, Rotation)
        found[name] = rotation.left if rotation.right is None else rotation.right
    return found


def largest_difference(a: Path, b: Path) -> float:
    first, second = rotations_of(a), rotations_of(b)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def uninterrupted(pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    base, experts, rollouts = pair
    out = tmp_path_factory.mktemp("fit")
    shared = {"rollouts": rollouts, "trainer": {"accelerator": "cpu", "log_every_n_steps": 1}, "seed": 0}
    return out, stiefel(base, experts, out, source="base", **shared, **HYPER)


def naive_kl(base, state: dict[str, torch.Tensor], experts, rollouts) -> dict[str, float]:
    """Held-out KL(expert || base with the tensors of `state`) in float64, sequence by sequence, from the definition."""
    student = AutoModelForCausalLM.from_pretrained(base.path)
    student.load_state_dict(state, strict=False)
    student.double()
    found = {}
    for name, expert in experts.items():
        teacher = AutoModelForCausalLM.from_pretrained(expert.path).double()
        values = []
        for rollout in split({name: read_rollouts(rollouts[name])}, seed=0, heldout=0.1)[1][name]:
            ids = torch.tensor([rollout.prompt + rollout.completion])
            with torch.no_grad():
                q, p = (model(ids).logits[0, len(rollout.prompt) - 1 : -1].softmax(-1) for model in (student, teacher))
            values.append((p * (p / q).log()).sum(-1))
        found[name] = float(torch.cat(values).mean())
    return found


def test_what_is_written_reproduces_the_final_model(uninterrupted, pair):
    out, summary = uninterrupted
    base, experts, rollouts = pair
    file = open_rotations(out / "rotations.safetensors")
    state = {name: file.get(name).apply(base.read(name)) for name in file.names}  # type: ignore[union-attr]
    assert naive_kl(base, state, experts, rollouts) == pytest.approx(summary["kl_after"], abs=1e-5)
    assert naive_kl(base, {}, experts, rollouts) == pytest.approx(summary["kl_before"], abs=1e-5)


def test_metadata_csv_and_summary_agree(uninterrupted, pair):
    out, summary = uninterrupted
    base, experts, _ = pair
    metadata = open_rotations(out / "rotations.safetensors").metadata
    assert json.loads(metadata["source"]) == summary["source"] == {"model": "base"}
    assert json.loads(metadata["teachers"]) == summary["teachers"] == ["math", "code"]
    assert json.loads(metadata["inputs"]) == {n: m.sha256 for n, m in {"base": base, **experts}.items()}
    assert metadata["parametrization"] == "stiefel"
    assert metadata["objective"] == "logits"
    assert float(metadata["orthogonality_error"]) < 1e-5
    rows = list(csv.DictReader((out / "align.csv").open()))
    assert list(rows[0]) == ["tensor", "layer", "module", "side", "angle_rms", "angle_max", "explained", "change"]
    assert len(rows) == 14
    sides = {(row["module"], row["side"]) for row in rows}
    right = {(name, "right") for name in ("q", "o", "gate", "up")}
    assert sides == right | {(name, "left") for name in ("k", "v", "down")}
    assert max(float(row["angle_max"]) for row in rows) == pytest.approx(summary["angle_max"])
    assert [row["step"] for row in summary["curve"]] == list(range(12))
    assert set(summary["curve"][0]) == {"step", "kl_math", "kl_code", "angle_rms", "orthogonality_error"}
    assert summary["curve"][0]["angle_rms"] == 0 < summary["curve"][-1]["angle_rms"]
    assert json.loads(json.dumps(summary)) == summary
    assert sorted(path.name for path in out.iterdir()) == ["align.csv", "rotations.safetensors"]


def test_the_learned_merge_is_the_merge_method_of_that_name(pair, call, tmp_path: Path):
    """From task arithmetic: what the method `learned` makes of the file has the KL that the fit ended with."""
    base, experts, rollouts = pair
    start = {"_target_": "rotrl.merge.linear.task_arithmetic", "_partial_": True, "scale": 1.0}
    summary = call(stiefel, tmp_path, source="start", start=start, **HYPER)
    assert summary["source"] == {"merge": start}
    method = bind({"_target_": "rotrl.merge.rotation.learned", "_partial_": True}, list(experts))
    merged = merge_state(base, experts, method, tmp_path / "rotations.safetensors")
    assert naive_kl(base, merged, experts, rollouts) == pytest.approx(summary["kl_after"], abs=1e-5)


def test_a_planted_rotation_is_learned_from_samples(pair, tmp_path: Path):
    """The teacher is the base with a rotation by .1 in every linear map: KL falls by a factor of 30 in 150 steps."""
    base, _, rollouts = pair
    model = AutoModelForCausalLM.from_pretrained(base.path)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                a = torch.randn(min(weight.shape), min(weight.shape))
                turn = exp(0.1 * (a - a.mT) / torch.linalg.matrix_norm(a - a.mT, 2))
                weight.copy_(turn @ weight if weight.shape[0] < weight.shape[1] else weight @ turn)
    model.save_pretrained(tmp_path / "turned")
    turned = open_checkpoint(tmp_path / "turned")
    shared = {"rollouts": {"turned": rollouts["math"]}, "trainer": {"accelerator": "cpu"}, "seed": 0}
    summary = stiefel(base, {"turned": turned}, tmp_path / "out", source="base", steps=150, lr=1e-2, batch=32, **shared)
    assert summary["kl_after"]["turned"] < summary["kl_before"]["turned"] / 30
    assert summary["closed_form"] > 0.99
    assert summary["orthogonality_error"] < 1e-5


def test_procrustes_start_begins_at_the_closed_form(call, tmp_path: Path):
    summary = call(stiefel, tmp_path, teachers=["math"], init="procrustes", steps=2, lr=1e-9, batch=8)
    assert summary["explained"] == pytest.approx(summary["closed_form"], abs=1e-4)
    assert summary["curve"][0]["angle_rms"] == pytest.approx(summary["angle_rms"], rel=0.01)


def test_the_angle_prior_holds_the_rotations_back(call, tmp_path: Path, uninterrupted):
    held = call(stiefel, tmp_path, angle_prior=100.0, **HYPER)
    assert held["angle_rms"] < uninterrupted[1]["angle_rms"] / 2


def test_frozen_models_in_bfloat16_leave_the_rotations_in_float32(call, tmp_path: Path, uninterrupted):
    trainer = {"accelerator": "cpu", "log_every_n_steps": 1, "precision": "bf16-mixed"}
    summary = call(stiefel, tmp_path, trainer=trainer, **HYPER)
    assert max(row["orthogonality_error"] for row in summary["curve"]) < 1e-6
    assert summary["kl_before"] == pytest.approx(uninterrupted[1]["kl_before"], rel=0.1)
    assert summary["angle_rms"] == pytest.approx(uninterrupted[1]["angle_rms"], rel=0.1)


def test_silent_and_without_folders_of_its_own(call, tmp_path: Path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    steps: list[tuple[int, int]] = []
    call(stiefel, tmp_path / "out", progress=lambda done, total: steps.append((done, total)), **{**HYPER, "steps": 3})
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupt_leaves_as_such_and_the_same_call_continues(call, tmp_path: Path, uninterrupted):
    def interrupt(done: int, _: int) -> None:
        if done == 8:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        call(stiefel, tmp_path, progress=interrupt, **HYPER)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in tmp_path.iterdir()] == ["align.ckpt"]
    steps: list[int] = []
    summary = call(stiefel, tmp_path, progress=lambda done, _: steps.append(done), **HYPER)
    assert steps == [7, 8, 9, 10, 11, 12]
    assert largest_difference(tmp_path, uninterrupted[0]) < 1e-5
    assert [row["step"] for row in summary["curve"]] == list(range(12))
    for name in ("math", "code"):
        assert summary["kl_after"][name] == pytest.approx(uninterrupted[1]["kl_after"][name], abs=1e-5)
    assert not (tmp_path / "align.ckpt").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from rotrl.align.fit import stiefel
from rotrl.checkpoint.reader import open_checkpoint
base, math, code, a, b, out = map(Path, sys.argv[1:])
kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 10 else None
stiefel(open_checkpoint(base), {"math": open_checkpoint(math), "code": open_checkpoint(code)}, out, progress=kill,
        rollouts={"math": a, "code": b}, trainer={"accelerator": "cpu", "log_every_n_steps": 1}, seed=0, source="base",
        steps=12, batch=8, lr=2e-3, checkpoint_every=3)
"""


@pytest.mark.slow
def test_a_killed_fit_continues_to_the_same_end(pair, tmp_path: Path, uninterrupted):
    base, experts, rollouts = pair
    paths = [base.path, *(model.path for model in experts.values()), *rollouts.values(), tmp_path]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, paths)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["align.ckpt"]
    steps: list[int] = []
    shared = {"rollouts": rollouts, "trainer": {"accelerator": "cpu", "log_every_n_steps": 1}, "seed": 0}
    stiefel(base, experts, tmp_path, source="base", progress=lambda n, _: steps.append(n), **shared, **HYPER)
    assert steps == [10, 11, 12]
    assert largest_difference(tmp_path, uninterrupted[0]) < 1e-5


def test_accumulated_gradients_make_one_step_and_continue(call, tmp_path: Path):
    trainer = {"accelerator": "cpu", "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    whole = call(stiefel, tmp_path / "whole", trainer=trainer, **HYPER)
    assert [row["step"] for row in whole["curve"]] == list(range(12))

    def stop(done: int, _: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(stiefel, tmp_path / "parts", trainer=trainer, progress=stop, **HYPER)
    call(stiefel, tmp_path / "parts", trainer=trainer, **HYPER)
    assert largest_difference(tmp_path / "parts", tmp_path / "whole") < 1e-5


def test_another_configuration_is_not_continued(call, tmp_path: Path):
    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(stiefel, tmp_path, progress=stop, **HYPER)
    with pytest.raises(ConfigError, match=r"align\.ckpt: belongs to another alignment \(lr was 0\.002, now 0\.003\)"):
        call(stiefel, tmp_path, **{**HYPER, "lr": 3e-3})
    (tmp_path / "align.ckpt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"align\.ckpt: no checkpoint of an alignment"):
        call(stiefel, tmp_path, **HYPER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": ["maths"]}, "align.teachers: no expert 'maths'; one of: all, math, code"),
        ({"teachers": []}, "align.teachers is empty"),
        ({"source": "bass"}, "align.source='bass'; one of: start, base, math, code"),
        ({"source": "start"}, "align.source=start needs align.start"),
        ({"rollouts": {}}, "rollouts of math, code are missing"),
        ({"rollouts": {"math": Path("absent"), "code": Path("absent")}}, "absent: rollouts can't be read"),
        ({"init": "zero"}, "align.init is 'zero', one of identity, procrustes is expected"),
        ({"side": "top"}, "align.side is 'top', one of small, large, left, right, both is expected"),
        ({"trainer": {"acelerator": "cpu"}}, "trainer.acelerator is no argument of .*, did you mean 'accelerator'?"),
        ({"trainer": {"max_steps": 3}}, "trainer.max_steps is set by align; use align.steps"),
        ({"trainer": {"strategy": "fsdp"}}, "trainer.strategy='fsdp' shards parameters"),
        ({"trainer": {"precision": "16-true"}}, "trainer.precision='16-true': rotations need float32"),
        ({"trainer": {"accelerator": "abacus"}}, "trainer: .*abacus"),
        ({"trainer": {"strategy": "ddp"}}, "trainer.strategy='ddp'; one of: auto, ddp_spawn"),
        ({"trainer": {"num_nodes": 2}}, "trainer.num_nodes=2: one node's devices are used; set trainer.devices"),
        (
            {"trainer": {"max_steps": 3, "strategy": "deepspeed"}},
            "trainer.max_steps is set .*; trainer.strategy='deeps",
        ),
        ({"trainer": {"accelerator": "cpu", "devices": "both"}}, "trainer.devices='both'; give a number"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(call, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as caught:
        call(stiefel, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
