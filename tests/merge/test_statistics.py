"""Statistics of the whole model: what they hold, that the engine gathers them in one pass, whatever the sharding."""

import numpy as np
import pytest
import torch

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.errors import ConfigError
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.plan import plan_merge
from rotrl.merge.sparse import trim
from rotrl.merge.statistics import Magnitudes, Overlap

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_threshold_of_the_whole_model(density):
    rng = np.random.default_rng(0)
    tensors = [
        (size * rng.standard_normal(count)).astype(np.float32) for size, count in ((1, 700), (1e-3, 900), (0, 50))
    ]
    magnitudes = Magnitudes()
    for d in tensors:
        magnitudes.add([(torch.zeros(len(d)), [torch.tensor(d)])])
    ordered = np.sort(np.abs(np.concatenate(tensors)))[::-1]
    exact = ordered[max(1, round(density * ordered.size)) - 1]
    [threshold] = magnitudes.thresholds(density)
    assert exact * (1 - 2**-12) <= threshold <= exact


def changed(trio, state):
    """How many entries of the model the merge changes, and how many there are."""
    base = {name: trio[0].read(name) for name in state}
    return sum(int((state[n] != base[n]).sum()) for n in state), sum(t.numel() for t in state.values())


def test_ties_with_one_threshold_for_the_model(tensors, save, shipped):
    from rotrl.merge.bind import bind

    base = tensors(0)
    expert = {name: w + (10 if name == Q else 1) * torch.randn(w.shape) for name, w in base.items()}
    trio = open_checkpoint(save("base", base)), {"math": open_checkpoint(save("math", expert))}
    state = merge_state(*trio, bind(shipped("ties", density=0.05, threshold="model"), ["math"]))
    kept, total = changed(trio, state)
    assert kept == pytest.approx(0.05 * total, abs=2)
    assert (state[Q] != base[Q]).sum() > 0.5 * kept
    assert torch.equal(
        merge_state(*trio, bind(shipped("ties", density=0.05), ["math"]))[Q], base[Q] + trim(expert[Q] - base[Q], 0.05)
    )


def test_ram_plus_in_the_engine_uses_the_overlap_of_the_model(trio, method):
    base, experts = trio
    overlap = Overlap(0.5, relative=True)
    pairs = {n: (base.read(n), [e.read(n) for e in experts.values()]) for n in base.tensors}
    for pair in pairs.values():
        overlap.add([pair])
    ram_plus = method("ram_plus", threshold=0.5, relative=True)
    for name, merged in merge_state(*trio, ram_plus).items():
        expected = ram_plus.function(*pairs[name], statistics=overlap, threshold=0.5, relative=True)
        assert torch.equal(merged, expected)


def test_first_pass_only_where_it_is_needed_and_not_for_a_reused_merge(trio, method, tmp_path, monkeypatch):
    reads = []
    assert all(model.sha256 for model in (trio[0], *trio[1].values()))  # hashed once, before the first merge
    read = type(trio[0]).view
    monkeypatch.setattr(type(trio[0]), "view", lambda self, name: reads.append(name) or read(self, name))
    for name, passes in (("ties", 1), ("ram_plus", 2)):
        reads.clear()
        merge(*trio, method(name), tmp_path / name)
        assert len(reads) == passes * 3 * len(trio[0].tensors)
        reads.clear()
        merge(*trio, method(name), tmp_path / name)
        assert not reads


def test_the_plan_tells_scale_and_passes(trio, method, shipped):
    plans = {name: plan_merge(*trio, method(name)) for name in ("ties", "ram_plus", "slerp", "svc")}
    assert {name: plan["scale"] for name, plan in plans.items()} == {"ties": 1, "ram_plus": 1, "slerp": None, "svc": 1}
    assert {name: plan["passes"] for name, plan in plans.items()} == {"ties": 1, "ram_plus": 2, "slerp": 1, "svc": 1}
    under = plan_merge(*trio, method("svc", of=shipped("ram_plus", scale="norm")))
    assert (under["scale"], under["passes"]) == ("norm", 2)


def test_parameters(method):
    assert method("ties").statistics() is None
    assert isinstance(method("ties", threshold="model").statistics(), Magnitudes)
    with pytest.raises(ConfigError, match=r"merge\.threshold is 'layer', one of tensor, model is expected"):
        method("ties", threshold="layer")
    with pytest.raises(ConfigError, match=r"merge\.rescale is 0\.5, it must be 1 or more"):
        method("ram_plus", rescale=0.5)
