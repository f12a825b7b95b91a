"""merge.precision=float64: to the digits of a float64 oracle before the cast, and to the stored dtype's after it."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rotrl.checkpoint.rotations import Rotation, save_rotations
from rotrl.checkpoint.rounding import cast
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.plan import plan_merge

Q = "model.layers.0.self_attn.q_proj.weight"


def orthomerge(base, experts):
    """Anchor .01 on the right side, residuals by .2, straight from the formulas."""
    base, *experts = (w.double().numpy() for w in (base, *experts))
    identity = np.eye(base.shape[1])
    mu = 0.01 * np.square(base).sum() / min(base.shape)
    rotations = [scipy.linalg.polar(base.T @ w + mu * identity)[0] for w in experts]
    generators = [np.linalg.solve(r + identity, r - identity) for r in rotations]
    total = sum(generators)
    q = np.mean([np.linalg.norm(g) for g in generators]) * total / np.linalg.norm(total)
    rest = sum(w - base @ r for w, r in zip(experts, rotations, strict=True))
    return torch.from_numpy(base @ np.linalg.solve(identity - q, identity + q) + 0.2 * rest)


def test_orthomerge_is_that_of_float64(trio, method):
    base, experts = trio
    exact, rough = (merge_state(*trio, method("orthomerge", precision=word)) for word in ("float64", "float32"))
    found, worst = 0, 0.0
    for name, merged in exact.items():
        if name.endswith("_proj.weight"):
            expected = orthomerge(base.read(name), [expert.read(name) for expert in experts.values()])
            torch.testing.assert_close(merged, expected, rtol=0, atol=1e-10)
            worst, found = max(worst, float((rough[name] - expected).abs().max())), found + 1
    assert found == 14
    assert worst > 1e-9


def nearest(x, bits):
    """Float64 values that the dtype with so many bits after the point holds, half to even; normal numbers only."""
    step = np.exp2(np.frexp(x)[1] - 1.0 - bits)
    return torch.as_tensor(np.rint(x / step) * step)


@given(
    head=st.integers(-(2**11), 2**11),
    tail=st.floats(-1, 1),
    size=st.sampled_from([0.0, 2.0**-40, 2.0**-24, 0.5, 1.0]),
    power=st.integers(-10, 3),
)
def test_no_value_of_float64_is_rounded_twice(head, tail, size, power):
    x = np.array([2.0**power * (head + size * tail)])
    for dtype, bits in ((torch.bfloat16, 7), (torch.float16, 10)):
        if x[0] and 2.0**-13 < abs(x[0]) < 6e4:
            assert torch.equal(cast(torch.tensor(x), dtype, "nearest", "x").double(), nearest(x, bits))
    tensor = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 1e300, 0.0, 1 + 2**-8 + 2**-40], dtype=torch.float64
    )
    expected = [float("nan"), float("inf"), -float("inf"), float("inf"), 0.0, 1 + 2**-7]
    torch.testing.assert_close(
        cast(tensor, torch.bfloat16, "nearest", "x").double(), torch.tensor(expected).double(), equal_nan=True
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_stored_is_rounded_once(dtype, trio, method, tmp_path):
    exact = method("orthomerge", precision="float64")
    result = merge(*trio, exact, tmp_path / "out", dtype=dtype)
    state = merge_state(*trio, exact)
    for name, stored in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = state[name].float() if dtype == "float32" else nearest(state[name].numpy(), 7).bfloat16()
        assert torch.equal(stored, expected)
    assert (0 < result["storage_loss"] < 1e-6) == (dtype == "float32")
    other = merge(*trio, method("orthomerge"), tmp_path / "rough", dtype=dtype)
    assert other["fingerprint"] != result["fingerprint"]


def test_stochastic_rounding_of_float64(trio, method, tmp_path):
    exact = method("orthomerge", precision="float64")
    merge(*trio, exact, tmp_path / "out", dtype="bfloat16", rounding="stochastic")
    state = merge_state(*trio, exact)
    for name, stored in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(stored.double(), state[name], rtol=2**-7, atol=1e-30)


def test_a_stack_is_as_precise_as_the_most_precise_of_it(trio, method, shipped):
    under = method("svc", of=shipped("ties", precision="float64"))
    assert merge_state(*trio, under)[Q].dtype == torch.float64
    assert merge_state(*trio, method("svc", of=shipped("ties")))[Q].dtype == torch.float32


def test_plan_tells_the_precision_and_its_memory(trio, method):
    plans = [plan_merge(*trio, method("orthomerge", precision=word)) for word in ("float32", "float64")]
    assert [plan["precision"] for plan in plans] == ["float32", "float64"]
    assert plans[1]["peak_bytes"] == 2 * plans[0]["peak_bytes"]
    assert plans[1]["bytes"] == plans[0]["bytes"]


@pytest.mark.parametrize(("start", "own"), [("float64", "float32"), ("float32", "float64")])
def test_learned_merge_from_a_start_of_another_precision(start, own, trio, method, shipped, tmp_path):
    base, experts = trio
    spec = shipped("task_arithmetic", precision=start)
    inputs = {"base": base.sha256, **{name: expert.sha256 for name, expert in experts.items()}}
    turn = Rotation(right=torch.eye(16)[[1, 0, *range(2, 16)]])
    metadata = {"source": json.dumps({"merge": spec}), "inputs": json.dumps(inputs)}
    save_rotations(tmp_path / "r.safetensors", {Q: turn}, metadata)
    chosen = method("learned", precision=own)
    merge(*trio, chosen, tmp_path / "out", rotations=tmp_path / "r.safetensors")
    state = load_file(tmp_path / "out" / "model.safetensors")
    expected = merge_state(*trio, method("task_arithmetic"))
    expected[Q] = expected[Q] @ turn.right
    for name, stored in state.items():
        torch.testing.assert_close(stored, expected[name], rtol=1e-6, atol=1e-6)
