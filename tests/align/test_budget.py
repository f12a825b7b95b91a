"""What saves time and memory and must change no number: recomputed activations, early stop, cheap retractions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotrl.align.data import TrainBatches, load_rollouts
from rotrl.align.fit import stiefel
from rotrl.align.manifold import DRIFT, Stiefel
from rotrl.align.models import load_models, recompute_layers
from rotrl.align.module import LogitAlignment
from rotrl.align.parametrization import Rotations
from rotrl.align.source import pose
from rotrl.linalg.rotation import exp
from tests.align.test_fit import HYPER, largest_difference

STOPPING = {"steps": 60, "batch": 8, "lr": 0.1, "validate_every": 3, "patience": 2, "checkpoint_every": 3}


def gradients(pair, recompute: bool) -> tuple[list[Tensor], int]:
    """Of the first batch at rotated weights, and the bytes that the forward pass keeps for the backward pass."""
    base, experts, rollouts = pair
    problem = pose(base, experts, source="base", start=None, teachers="all")
    student, teachers = load_models(base, problem, torch.float32)
    if recompute:
        recompute_layers(student)
    module = LogitAlignment(Rotations(problem.matrices), student, teachers)
    torch.manual_seed(0)
    with torch.no_grad():
        for part in module.family.parameters():
            a = 0.05 * torch.randn_like(part)
            part.copy_(exp(a - a.mT))
    batch = TrainBatches(load_rollouts(experts, rollouts, max_tokens=None), batch=8, steps=1, seed=0).at(0)
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss, _ = module.objective(batch)
    loss.backward()
    assert all(part.grad is not None for part in module.family.parameters())
    return [part.grad for part in module.family.parameters() if part.grad is not None], kept


def test_recomputed_activations_give_the_same_gradient_and_are_not_kept(pair):
    kept, kept_bytes = gradients(pair, False)
    again, again_bytes = gradients(pair, True)
    for a, b in zip(kept, again, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-6
    assert again_bytes < kept_bytes / 3


def test_a_fit_with_recomputed_activations_ends_where_one_without_does(call, tmp_path: Path):
    for recompute in (False, True):
        call(stiefel, tmp_path / str(recompute), gradient_checkpointing=recompute, **{**HYPER, "steps": 4})
    assert largest_difference(tmp_path / "True", tmp_path / "False") < 1e-6


def test_accumulated_halves_are_the_gradient_of_the_whole(pair):
    """Lightning divides by the number of parts; each part is a mean over its own tokens."""
    base, experts, rollouts = pair
    problem = pose(base, experts, source="base", start=None, teachers=["math"])
    module = LogitAlignment(Rotations(problem.matrices), *load_models(base, problem, torch.float32))
    batches = TrainBatches(load_rollouts(["math"], rollouts, max_tokens=None), batch=8, steps=2, seed=0)
    parts = []
    for step in range(2):
        module.zero_grad()
        module.objective(batches.at(step))[0].backward()
        parts.append([part.grad.clone() for part in module.family.parameters() if part.grad is not None])
    module.zero_grad()
    for step in range(2):
        (module.objective(batches.at(step))[0] / 2).backward()
    for part, first, second in zip(module.family.parameters(), *parts, strict=True):
        torch.testing.assert_close(part.grad, (first + second) / 2, rtol=1e-5, atol=1e-8)


def test_a_fit_that_gets_worse_stops_and_keeps_the_best(call, tmp_path: Path):
    """At a rate far too high: the parameters kept are those of the lowest held-out KL, and their KL is that."""
    steps: list[int] = []
    summary = call(stiefel, tmp_path, progress=lambda n, _: steps.append(n), **STOPPING)
    told = [(row["kl_math"] + row["kl_code"]) / 2 for row in summary["validations"]]
    assert [row["step"] for row in summary["validations"]] == list(range(3, steps[-1] + 1, 3))
    assert steps[-1] < 60
    assert len(told) - 1 - told.index(min(told)) == 2
    assert sum(summary["kl_after"].values()) / 2 == pytest.approx(min(told), rel=1e-6)


def test_an_early_stop_survives_an_interruption(call, tmp_path: Path):
    whole = call(stiefel, tmp_path / "whole", **STOPPING)

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(stiefel, tmp_path / "parts", progress=stop, **STOPPING)
    parts = call(stiefel, tmp_path / "parts", **STOPPING)
    assert [row["step"] for row in parts["validations"]] == [row["step"] for row in whole["validations"]]
    assert largest_difference(tmp_path / "parts", tmp_path / "whole") < 1e-5


def test_a_fit_that_was_interrupted_at_its_stop_is_over(call, tmp_path: Path, monkeypatch):
    whole = call(stiefel, tmp_path / "whole", **STOPPING)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rotrl.align.learn.write_results", stop)
        with pytest.raises(KeyboardInterrupt):
            call(stiefel, tmp_path / "parts", **STOPPING)
    steps: list[int] = []
    parts = call(stiefel, tmp_path / "parts", progress=lambda n, _: steps.append(n), **STOPPING)
    assert steps == []
    assert parts["validations"] == whole["validations"]
    assert largest_difference(tmp_path / "parts", tmp_path / "whole") == 0


@pytest.mark.parametrize(("size", "steps"), [(1e-3, 0), (0.05, 0), (0.8, 2), (40.0, 1)])
def test_the_retraction_mends_no_more_than_it_has_to(monkeypatch, size: float, steps: int):
    """Small steps leave nothing that has to be mended, large ones take two, and a huge one is mended by SVD at once."""
    a = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    a = a - a.mT
    a = a * size / torch.linalg.matrix_norm(a)[:, None, None]
    norm, calls = torch.linalg.matrix_norm, []
    monkeypatch.setattr(torch.linalg, "matrix_norm", lambda error: calls.append(1) or norm(error))
    y = Stiefel().retr(exp(a.double()).float(), a)
    assert len(calls) == steps
    assert (y.mT @ y - torch.eye(16)).abs().max() < 1e-6 + 16 * DRIFT * (steps == 0)


def test_what_small_steps_leave_adds_up_and_is_mended():
    """One direction all along: A^4 / 4 of a step is a fifth of what is allowed."""
    a = torch.zeros(8, 8, dtype=torch.float64)
    a[0, 1] = (0.8 * DRIFT) ** 0.25
    a -= a.mT.clone()
    x, errors = torch.eye(8, dtype=torch.float64), []
    for _ in range(50):
        x = Stiefel().retr(x, a)
        errors.append(float((x.mT @ x - torch.eye(8)).abs().max()))
    assert max(errors) < DRIFT
    assert sum(error < DRIFT / 100 for error in errors) == 10
    assert torch.linalg.matrix_norm(x - exp(50 * a), 2) < 50 * a.max() ** 3 / 6
