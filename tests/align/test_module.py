import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotrl.align.data import Batch, TrainBatches, heldout_batches, load_rollouts
from rotrl.align.models import load_models
from rotrl.align.module import PATIENCE, LogitAlignment
from rotrl.align.parametrization import Rotations
from rotrl.align.source import pose
from rotrl.align.trainer import fit, make_trainer, quiet
from rotrl.errors import NumericsError
from rotrl.linalg.rotation import exp

TRAINER = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}


def make_module(pair, *, source: str = "base", dtype: torch.dtype = torch.float32, steps: int = 8) -> LogitAlignment:
    base, experts, rollouts = pair
    problem = pose(base, experts, source=source, start=None, teachers="all")
    with quiet():
        student, teachers = load_models(base, problem, dtype)
    samples = load_rollouts(problem.teachers, rollouts, max_tokens=None)
    return LogitAlignment(
        Rotations({name: matrix.to(dtype) for name, matrix in problem.matrices.items()}),
        student,
        teachers,
        train=TrainBatches(samples, batch=8, steps=steps, seed=0),
        heldout=heldout_batches(samples, batch=8),
        lr=1e-3,
    )


def turns(module: LogitAlignment) -> Rotations:
    assert isinstance(module.family, Rotations)
    return module.family


def batch_of(module: LogitAlignment) -> Batch:
    assert module.train_batches is not None
    return module.train_batches.at(0)


def naive_kl(module: LogitAlignment, name: str, weights: dict[str, Tensor]) -> float:
    """One sequence at a time, without padding or hooks: weights copied in, whole logits, the definition of KL."""
    student, teacher = copy.deepcopy(module.student), module.teachers[name]
    student.load_state_dict(weights, strict=False)
    values = []
    for ids, predicts in zip(*(batch_of(module)[name][key] for key in ("ids", "predicts")), strict=True):
        last = int(predicts.nonzero().max()) + 2
        with torch.no_grad():
            q, p = (model(ids[None, :last]).logits[0].double().softmax(-1) for model in (student, teacher))
        values.append((p * (p / q).log()).sum(-1)[predicts[:last]])
    return float(torch.cat(values).mean())


def test_kl_is_that_of_the_whole_model_with_the_rotated_weights(pair):
    module = make_module(pair, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for part in turns(module).rotations:
            generator = 0.1 * torch.randn_like(part)
            part.copy_(exp(generator - generator.mT))
    rotated = module.adapted()
    for name in module.teachers:
        kl = float(module.kl(name, batch_of(module)[name], rotated).detach())
        assert kl == pytest.approx(naive_kl(module, name, rotated), rel=1e-6)


def test_kl_is_zero_where_the_source_is_the_teacher(pair):
    module = make_module(pair, source="math", dtype=torch.float64)
    kl = module.kl("math", batch_of(module)["math"], module.adapted())
    kl.backward()
    assert kl.abs() < 1e-13
    assert max(float(part.grad.abs().max()) for part in turns(module).rotations if part.grad is not None) < 1e-12


def test_riemannian_gradient_against_finite_differences(pair):
    """Central differences along random skew directions; transformers' norms are float32, hence the wide step."""
    module = make_module(pair, dtype=torch.float64)
    batch = batch_of(module)["code"]
    module.kl("code", batch, module.adapted()).backward()
    torch.manual_seed(0)
    for part in turns(module).rotations:
        generator = torch.randn_like(part)
        generator = (generator - generator.mT) / torch.linalg.matrix_norm(generator - generator.mT, 2).max()
        assert part.grad is not None
        slope = float((part.grad * generator).sum())  # at the identity
        values = []
        for t in (1e-3, -1e-3):
            with torch.no_grad():
                part.copy_(exp(t * generator))
                values.append(float(module.kl("code", batch, module.adapted())))
        with torch.no_grad():
            part.copy_(exp(0 * generator))
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=1e-3)


class Poisoned(LogitAlignment):
    """Gives a NaN loss at the steps in `bad` and keeps the parameters that each step began with."""

    bad: frozenset[int] = frozenset()
    seen: list[Tensor]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(turns(self).rotations[0].detach().clone())
        loss = super().training_step(batch, index)
        return loss * float("nan") if self.global_step in self.bad else loss


def poisoned(pair, bad: set[int], steps: int) -> Poisoned:
    module = make_module(pair, steps=steps)
    module.__class__ = Poisoned
    assert isinstance(module, Poisoned)
    module.bad, module.seen = frozenset(bad), []
    return module


def train(module: LogitAlignment, out: Path, steps: int) -> None:
    with quiet():
        fit(make_trainer(TRAINER, out, steps=steps), module, None)


def test_a_nan_gradient_skips_its_step_and_harms_nothing(pair, tmp_path: Path):
    module = poisoned(pair, {2, 3}, steps=6)
    train(module, tmp_path, steps=6)
    moved = [not torch.equal(a, b) for a, b in zip(module.seen, module.seen[1:], strict=False)]
    assert moved == [True, True, False, False, True]
    assert turns(module).orthogonality_error() < 1e-6


def test_nan_gradients_in_a_row_end_the_fit(pair, tmp_path: Path):
    module = poisoned(pair, set(range(2, 20)), steps=20)
    with pytest.raises(NumericsError, match=f"NaN or Inf {PATIENCE} steps in a row; lower align.lr"):
        train(module, tmp_path, steps=20)
    assert len(module.seen) == 2 + PATIENCE


def test_drift_is_projected_back(pair, tmp_path: Path):
    module = make_module(pair, steps=2)
    with torch.no_grad():
        for part in turns(module).rotations:
            part.mul_(1.001)
    turns(module).rotations[0].manifold.retr = lambda x, u: x + u  # a retraction that mends nothing
    train(module, tmp_path, steps=2)
    assert turns(module).orthogonality_error() < 1e-5


def test_frozen_models_learn_nothing_and_are_in_no_checkpoint(pair, tmp_path: Path):
    module = make_module(pair, steps=2)
    before = {name: weight.clone() for name, weight in module.student.state_dict().items()}
    train(module, tmp_path, steps=2)
    assert all(torch.equal(weight, before[name]) for name, weight in module.student.state_dict().items())
    stored = torch.load(tmp_path / "align.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == {f"family.rotations.{i}" for i in range(len(turns(module).stacks))}
