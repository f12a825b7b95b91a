"""Fits on two devices, which are two real processes on the CPU."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from safetensors.torch import load_file
from torch import Tensor

from rotrl.align.data import TrainBatches, load_rollouts
from rotrl.align.fit import lora, stiefel
from rotrl.align.models import load_models
from rotrl.align.module import LogitAlignment
from rotrl.align.parametrization import Rotations
from rotrl.align.ranks import in_ranks
from rotrl.align.source import pose
from rotrl.errors import ConfigError, NumericsError
from tests.align import rank_ends

TRAINER = {"accelerator": "cpu", "log_every_n_steps": 1}
TWO = TRAINER | {"devices": 2, "strategy": "ddp_spawn"}
HYPER = {"steps": 8, "lr": 2e-3, "patience": 3, "validate_every": 2, "checkpoint_every": 3, "seed": 0, "source": "base"}


def check_equal(one: Path, two: Path, whole: dict, shared: dict) -> None:
    a, b = (load_file(folder / whole["rotations"]) for folder in (one, two))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5
    for key in ("kl_before", "kl_after"):
        assert shared[key] == pytest.approx(whole[key], rel=1e-5)
    for key in ("curve", "validations"):
        assert len(shared[key]) == len(whole[key])
        for row, expected in zip(shared[key], whole[key], strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sorted(path.name for path in two.iterdir()) == ["align.csv", whole["rotations"]]


@pytest.mark.slow
def test_two_spawned_ranks_end_where_one_process_does(call, tmp_path: Path, capfd):
    """Of 5 sequences one has 3 and the other 2; gradients accumulate; both stop by the same held-out KL."""
    steps: dict[str, list[int]] = {"one": [], "two": []}
    whole, shared = (
        call(
            stiefel,
            tmp_path / name,
            trainer=trainer | {"accumulate_grad_batches": 2},
            batch=5,
            init="procrustes",
            progress=lambda done, _, name=name: steps[name].append(done),
            **HYPER,
        )
        for name, trainer in (("one", TRAINER), ("two", TWO))
    )
    assert steps["one"] == steps["two"]
    check_equal(tmp_path / "one", tmp_path / "two", whole, shared)
    assert capfd.readouterr() == ("", "")


TASK = """
import atexit, json, sys
from pathlib import Path
import torch
atexit.register(lambda: print("in a group at its end:", torch.distributed.is_initialized(), file=sys.stderr))
from rotrl.align.fit import lora
from rotrl.checkpoint.reader import open_checkpoint
base, math, code, a, b, out, hyper = sys.argv[1:]
experts = {"math": open_checkpoint(math), "code": open_checkpoint(code)}
print(json.dumps(lora(open_checkpoint(base), experts, Path(out), rollouts={"math": Path(a), "code": Path(b)},
                      trainer={"accelerator": "cpu", "devices": 2, "log_every_n_steps": 1}, **json.loads(hyper))))
"""


@pytest.mark.slow
def test_two_tasks_of_a_slurm_step_end_where_one_process_does(pair, call, tmp_path: Path):
    """srun starts the script once a task; the environment is what it gives them."""
    base, experts, rollouts = pair
    whole = call(lora, tmp_path / "one", trainer=TRAINER, batch=3, **HYPER)
    paths = [base.path, *(model.path for model in experts.values()), *rollouts.values(), tmp_path / "two"]
    command = [sys.executable, "-c", TASK, *map(str, paths), json.dumps(HYPER | {"batch": 3})]
    step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    step |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ | step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    (first, one), (second, other) = (task.communicate(timeout=200) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], one + other
    assert "in a group at its end: False" in one
    assert "in a group at its end: False" in other
    assert second == "{}\n"
    check_equal(tmp_path / "one", tmp_path / "two", whole, json.loads(first))


@pytest.mark.parametrize(("batch", "ranks"), [(5, 2), (6, 3), (1, 2)])
def test_shares_of_a_batch_give_its_loss_and_gradient_in_the_mean(pair, batch: int, ranks: int):
    base, experts, rollouts = pair
    problem = pose(base, experts, source="base", start=None, teachers="all")
    family = Rotations({name: matrix.double() for name, matrix in problem.matrices.items()})
    module = LogitAlignment(family, *load_models(base, problem, torch.float64))
    samples = load_rollouts(experts, rollouts, max_tokens=None)

    def share(rank: int, ranks: int) -> list[Tensor]:
        module.zero_grad()
        loss, figures = module.objective(
            TrainBatches(samples, batch=batch, steps=1, seed=0, rank=rank, ranks=ranks).at(0)
        )
        loss.backward()
        gradients = [part.grad.clone() for part in family.parameters() if part.grad is not None]
        return [loss.detach(), *figures.values(), *gradients]

    whole, shares = share(0, 1), [share(rank, ranks) for rank in range(ranks)]
    for expected, *parts in zip(whole, *shares, strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("told", NumericsError, "^the gradient was NaN$"),
        ("killed", ConfigError, "^trainer.devices: rank 1 of 2 was ended by SIGKILL, .* the same command continues"),
    ],
)
@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_one_error(tmp_path: Path, capfd, how: str, error: type, message: str):
    with pytest.raises(error, match=message):
        in_ranks(partial(rank_ends.end, how, tmp_path), 2, None)
    assert capfd.readouterr() == ("", "")
    assert not [path.name for path in tmp_path.iterdir() if Path("/proc", path.name).exists()]


@pytest.mark.slow
def test_an_interrupt_leaves_no_rank_behind(tmp_path: Path, capfd):
    def interrupt(*_: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        in_ranks(partial(rank_ends.tell, tmp_path), 2, interrupt)
    assert capfd.readouterr() == ("", "")
    assert not [path.name for path in tmp_path.iterdir() if Path("/proc", path.name).exists()]
