"""Experts as merges see them: a descendant's own update, and the gauge nearest to the base."""

import pytest
import torch

from rotrl.checkpoint.canonical import canonicalize
from rotrl.checkpoint.folder import on_disk
from rotrl.checkpoint.reader import Checkpoint, open_checkpoint
from rotrl.checkpoint.rebase import rebase
from rotrl.errors import CheckpointError
from rotrl.linalg.gauge import head_rotation, neurons, rope_rotation
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge_state

SUM = {"_target_": "rotrl.merge.linear.task_arithmetic", "_partial_": True, "scale": 1.0, "scope": "all"}


def merged(base: Checkpoint, **experts: Checkpoint) -> dict[str, torch.Tensor]:
    return merge_state(base, experts, bind(SUM, list(experts)))


def test_a_rebased_child_merges_as_the_sibling_that_it_would_be(tensors, save) -> None:
    base = tensors(0)
    math, own = tensors(1, base=base), tensors(2, base=base)
    child = {name: math[name] + (own[name] - base[name]) for name in base}
    paths = {"base": base, "math": math, "own": own, "code": child}
    models = {name: open_checkpoint(save(name, state)) for name, state in paths.items()}
    code = rebase(models["code"], models["math"], models["base"])
    expected = merged(models["base"], math=models["math"], code=models["own"])
    for name, tensor in merged(models["base"], math=models["math"], code=code).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(code.read(name), own[name], rtol=1e-5, atol=1e-5)
    assert code.sha256 not in {model.sha256 for model in models.values()}


def test_bf16_children_keep_their_update_in_float32(tensors, save) -> None:
    base = tensors(0)
    math = tensors(1, base=base)
    states = {"base": base, "math": math, "code": tensors(2, base=math, size=1e-2)}
    base, math, code = (open_checkpoint(save(n, s, dtype=torch.bfloat16)) for n, s in states.items())
    for name in base.tensors:
        exact = code.read(name).double() - math.read(name).double()
        found = rebase(code, math, base).read(name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double() - base.read(name).double(), exact, rtol=0, atol=1e-6)


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 16}  # heads of 4


def test_a_disguised_expert_becomes_itself_and_is_written_as_such(tensors, save, tmp_path) -> None:
    base = tensors(0)
    expert = tensors(1, base=base, size=0.01)
    hidden, draw = dict(expert), torch.Generator().manual_seed(3)
    for layer in range(2):
        turn = torch.linalg.qr(torch.randn(4, 4, generator=draw)).Q
        hidden = rope_rotation(head_rotation(hidden, layer, 0, turn), layer, 0, torch.randn(2, generator=draw))
        hidden = neurons(hidden, layer, torch.randperm(24, generator=draw), torch.randn(24, generator=draw))
    states = {"base": base, "expert": expert, "hidden": hidden}
    root, plain, disguised = (open_checkpoint(save(name, state, **CONFIG)) for name, state in states.items())
    found, own = canonicalize(disguised, root), canonicalize(plain, root)
    for name in base:
        torch.testing.assert_close(found.read(name), own.read(name), rtol=1e-3, atol=1e-4)
        assert (found.read(name) - base[name]).norm() < 1.1 * (expert[name] - base[name]).norm() + 1e-4
    written = on_disk(found, tmp_path / "cache")
    assert not written.derived
    assert all(torch.equal(written.read(name), found.read(name).to(written.tensors[name].dtype)) for name in base)


def test_layers_in_which_these_are_no_gauges_are_refused(tensors, save) -> None:
    base = tensors(0)
    normed = base | {f"model.layers.{i}.self_attn.q_norm.weight": torch.ones(4) for i in range(2)}
    model = open_checkpoint(save("qwen3", normed, **CONFIG))
    with pytest.raises(CheckpointError, match=r"q_norm\.weight' is there; models\.canonicalize knows"):
        canonicalize(model, model)
    fused = {name: tensor for name, tensor in base.items() if "k_proj" not in name}
    model = open_checkpoint(save("fused", fused, **CONFIG))
    with pytest.raises(CheckpointError, match="q, k, v, o, gate, up, down are not all there"):
        canonicalize(model, model)
