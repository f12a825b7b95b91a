"""The weight objective, whose answer is known: what is learned must reach it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rotrl.align.closed_form import procrustes
from rotrl.align.data import read_rollouts, split
from rotrl.align.fit import cayley, coefficients, free, stiefel
from rotrl.align.learn import check
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.rotations import open_rotations
from rotrl.errors import ConfigError
from rotrl.linalg.procrustes import nearest
from rotrl.linalg.rotation import exp

STEPS = 400  # the budget of a planted rotation
QUIET = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 100}
WEIGHT = {"objective": "weight", "rollouts": None, "trainer": QUIET, "steps": STEPS}


@pytest.mark.parametrize("angle", [0.001, 0.3, 2.0])
def test_planted_rotations_come_back_through_the_whole_stage(pair, tmp_path: Path, angle: float):
    base = pair[0]
    model, planted = AutoModelForCausalLM.from_pretrained(base.path).double(), {}
    with torch.no_grad():
        for seed, (name, weight) in enumerate(model.named_parameters()):
            if name.endswith("proj.weight"):
                n = min(weight.shape)
                a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                planted[name] = exp((a - a.mT) * angle / torch.linalg.matrix_norm(a - a.mT, 2))
                left = weight.shape[0] < weight.shape[1]
                weight.copy_(planted[name] @ weight if left else weight @ planted[name])
    model.save_pretrained(tmp_path / "turned")
    experts = {"turned": open_checkpoint(tmp_path / "turned")}
    hyper = {"source": "base", "seed": 0, "lr": angle / 10, "angle_prior": 0.0, **WEIGHT}
    summary = stiefel(base, experts, tmp_path / "out", **hyper)
    file = open_rotations(tmp_path / "out" / "rotations.safetensors")
    for name, truth in planted.items():
        found = file.get(name)
        rotation = found.right if found.left is None else found.left  # type: ignore[union-attr]
        assert (rotation - truth).abs().max() < 1e-5
    assert summary["kl_before"] == summary["kl_after"] == {}
    assert summary["curve"][0].keys() == {"step", "distance", "angle_rms", "orthogonality_error"}
    assert summary["curve"][0]["distance"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    "changes", [{"block": 4}, {"share": "layer"}, {"share": "residual"}, {"side": "right", "block": 8}]
)
def test_the_optimum_is_the_closed_form(call, tmp_path: Path, changes: dict):
    learned = call(stiefel, tmp_path / "learned", lr=0.01, angle_prior=0.0, anchor=0.0, **WEIGHT, **changes)
    solved = call(procrustes, tmp_path / "solved", rollouts=None, anchor=0.0, **changes)
    assert learned["explained"] == pytest.approx(learned["closed_form"], abs=1e-5)
    assert learned["closed_form"] == pytest.approx(solved["explained"], abs=1e-12)
    assert solved["explained"] > 0.02


def test_other_families_reach_what_they_can(call, tmp_path: Path):
    """Free weights reach the teacher; coefficients of both task vectors as well, if the teacher is one of them."""
    short = WEIGHT | {"steps": 120}
    assert call(free, tmp_path / "free", lr=5e-3, **short)["explained"] > 0.999
    alone = call(coefficients, tmp_path / "c", teachers=["code"], lr=5e-2, **short)
    assert alone["explained"] > 0.999
    turned = call(cayley, tmp_path / "cayley", lr=0.01, angle_prior=0.0, **short)
    assert turned["explained"] == pytest.approx(turned["closed_form"], abs=2e-3)


def test_mix_weighs_the_teachers(call, tmp_path: Path):
    """With nearly all the weight on one teacher the fit goes there; the closed form too."""
    for function, hyper in ((free, {"lr": 5e-3, **WEIGHT, "steps": 60}), (procrustes, {"rollouts": None})):
        one = call(function, tmp_path / "one", teachers=["code"], **hyper)
        both = call(function, tmp_path / "both", mix={"math": 1, "code": 1e6}, **hyper)
        equal = call(function, tmp_path / "equal", mix={"math": 3, "code": 3}, **hyper)
        plain = call(function, tmp_path / "plain", **hyper)
        assert both["change"] == pytest.approx(one["change"], rel=1e-3)
        assert equal["change"] == plain["change"]
        assert abs(one["change"] / plain["change"] - 1) > 0.1


def test_mix_weighs_the_kl(call, tmp_path: Path):
    hyper = {"steps": 12, "batch": 8, "lr": 2e-3}
    mixed = {k: call(stiefel, tmp_path / k, mix={"math": 1, "code": 1, k: 20}, **hyper) for k in ("math", "code")}
    for name, other in (("math", "code"), ("code", "math")):
        assert mixed[name]["kl_after"][name] < mixed[other]["kl_after"][name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "weights"}, "align.objective is 'weights', one of logits, activation, weight is expected"),
        ({"mix": {"math": 1}}, "align.mix={'math': 1}; give every teacher a weight above 0: math, code"),
        ({"mix": {"math": 1, "code": -1}}, "align.mix.code is -1, it must be above 0"),
        ({"patience": 0}, "align.patience is 0, it must be 1 or more"),
        ({"patience": 2, "rollouts": None}, "align.patience looks at the KL on samples, and there are none"),
        ({"patience": 2, "validate_every": 0}, "align.validate_every is 0, it must be 1 or more"),
        ({"rollouts": None}, "rollouts of math, code are missing"),
        (
            {"objective": "w", "init": "zero"},
            "align.objective is 'w'.*; align.init is 'zero', one of identity",
        ),
    ],
)
def test_wrong_choices_are_named(call, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        call(stiefel, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def inputs_of(model, rollouts: list) -> dict[str, torch.Tensor]:
    """Mean of x x^T over all tokens, one sequence at a time, by the names of the weights."""
    sums, tokens = {}, 0

    def add(name: str, given: torch.Tensor) -> None:
        x = given.double().flatten(0, -2)
        sums[name] = sums.get(name, 0) + x.T @ x

    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.register_forward_pre_hook(lambda _, given, name=name: add(f"{name}.weight", given[0]))
    for rollout in rollouts:
        with torch.no_grad():
            model(torch.tensor([rollout.prompt + rollout.completion]))
        tokens += len(rollout)
    return {name: total / tokens for name, total in sums.items()}


def test_activations_on_the_left_reach_their_closed_form(pair, call, tmp_path: Path):
    """`R = polar(sum_k mix_k T_k C_k W^T)`, C_k from hooks of its own on the samples that are learned from."""
    base, experts, rollouts = pair
    mix = {"math": 0.75, "code": 0.25}
    hyper = WEIGHT | {"objective": "activation", "rollouts": rollouts, "mix": mix}
    summary = call(stiefel, tmp_path, side="left", block=16, lr=0.02, angle_prior=0.0, **hyper)
    learnt, _ = split({name: read_rollouts(rollouts[name]) for name in experts}, seed=0, heldout=0.1)
    metrics = {n: inputs_of(AutoModelForCausalLM.from_pretrained(experts[n].path), learnt[n]) for n in experts}
    file = open_rotations(tmp_path / "rotations.safetensors")
    rotations = 0
    for name in file.names:
        w = base.read(name).double()
        overlap = sum(mix[n] * experts[n].read(name).double() @ metrics[n][name] @ w.T for n in experts)
        blocks = [overlap[at : at + 16, at : at + 16] for at in range(0, len(w), 16)]  # type: ignore[index]
        best = torch.block_diag(*(nearest(part) for part in blocks))
        if any(torch.linalg.det(nearest(part)) < 0 for part in blocks):
            continue  # a reflection, which no rotation reaches
        rotations += 1
        found = file.get(name).left.double()  # type: ignore[union-attr]

        def missed(r: torch.Tensor, name: str = name, w: torch.Tensor = w) -> float:
            gaps = {n: r @ w - experts[n].read(name).double() for n in experts}
            return float(sum(mix[n] * (d @ metrics[n][name] * d).sum() for n, d in gaps.items()))

        start = missed(torch.eye(len(w), dtype=torch.float64))
        assert abs(missed(found) - missed(best)) < 1e-4 * start
        assert missed(best) < 0.99 * start
    assert rotations > 7
    assert summary["curve"][0]["distance"] == pytest.approx(1, rel=1e-6)


def test_procrustes_start_of_activations_is_their_optimum_on_the_left(pair, call, tmp_path: Path):
    """That of `sum_k mix_k |(R W - T_k) X_k|^2 + mu |R - I|^2`, which no rotation nearby betters."""
    base, experts, rollouts = pair
    hyper = WEIGHT | {"objective": "activation", "rollouts": rollouts, "mix": {"math": 3, "code": 1}, "steps": 1}
    call(stiefel, tmp_path, side="left", init="procrustes", anchor=0.05, lr=1e-12, **hyper)
    learnt, _ = split({name: read_rollouts(rollouts[name]) for name in experts}, seed=0, heldout=0.1)
    metrics = {n: inputs_of(AutoModelForCausalLM.from_pretrained(experts[n].path), learnt[n]) for n in experts}
    file, generator = open_rotations(tmp_path / "rotations.safetensors"), torch.Generator().manual_seed(0)
    for name in file.names:
        w, identity = base.read(name).double(), torch.eye(base.tensors[name].shape[0], dtype=torch.float64)
        terms = [(c, experts[n].read(name).double(), metrics[n][name]) for n, c in (("math", 0.75), ("code", 0.25))]
        mu = 0.05 * sum(c * (w @ metric * w).sum() for c, _, metric in terms) / min(w.shape)

        def missed(r: torch.Tensor, w=w, terms=terms, mu=mu, identity=identity) -> float:
            rest = sum(c * ((r @ w - t) @ metric * (r @ w - t)).sum() for c, t, metric in terms)
            return float(rest + mu * (r - identity).square().sum())

        found = file.get(name).left.double()  # type: ignore[union-attr]
        assert missed(found) < 0.999 * missed(identity)
        for size in (1e-3, 1e-1):
            a = size * torch.randn(identity.shape, dtype=torch.float64, generator=generator)
            assert missed(exp(a - a.mT) @ found) > missed(found)
        overlap = sum(c * t @ metric @ w.mT for c, t, metric in terms) + mu * identity
        assert (found - nearest(overlap)).abs().max() < 1e-5


def test_activations_on_the_right_are_learned(call, tmp_path: Path):
    hyper = {"objective": "activation", "trainer": QUIET | {"log_every_n_steps": 10}, "steps": 60, "side": "right"}
    summary = call(stiefel, tmp_path, lr=0.02, angle_prior=0.0, **hyper)
    distances = [row["distance"] for row in summary["curve"]]
    assert distances[0] == pytest.approx(1, rel=1e-6)
    assert distances[-1] < 0.95
    assert sum(summary["kl_after"].values()) < sum(summary["kl_before"].values())


def test_an_objective_without_its_samples_is_refused_before_anything_runs():
    with pytest.raises(
        ConfigError, match=r"align\.objective=logits needs samples of each teacher; give align\.samples"
    ):
        check({"objective": "logits", "samples": None}, sampled=False)
    check({"objective": "weight", "samples": None}, sampled=False)
    check({"side": "small"}, sampled=False)  # the closed form
