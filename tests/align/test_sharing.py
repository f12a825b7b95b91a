"""Rotations that several matrices have in common, and what a rotation of the residual stream leaves alone."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotrl.align.data import collate, read_rollouts
from rotrl.align.low_rank import LowRankTurns
from rotrl.align.module import LogitAlignment
from rotrl.align.parametrization import CayleyTurns, Rotations, Turns
from rotrl.checkpoint.layout import role_of
from rotrl.errors import ConfigError
from rotrl.linalg.gauge import head_rotation, query_key_rotation, residual_rotation, rope_rotation
from rotrl.linalg.rotation import exp
from tests.align.conftest import make_model

KINDS = {"stiefel": Rotations, "cayley": CayleyTurns, "low_rank": LowRankTurns}


def turned(d: int, size: float, seed: int) -> Tensor:
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return exp(size * (a - a.mT) / torch.linalg.matrix_norm(a - a.mT, 2))


def model_and_state() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """In float64; its norms have gains of one."""
    model = make_model(0).double()
    return model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def matrices(state: dict[str, Tensor], *more: str) -> dict[str, Tensor]:
    kinds = {name: role_of(name, tensor.shape) for name, tensor in state.items()}
    return {name: state[name] for name, role in kinds.items() if role.is_matrix or role.module in more}


def kl_of(model: PreTrainedModel, state: dict[str, Tensor], pair) -> float:
    """The logit objective of a student with the weights `state` and the model as its teacher."""
    student = copy.deepcopy(model)
    student.load_state_dict(state, strict=False)
    module = LogitAlignment(Rotations(matrices(state)), student, {"model": model})
    batch = collate(read_rollouts(pair[2]["math"])[:8])
    return float(module.kl("model", batch, {}))


def applied(family: Turns, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {name: rotation.apply(state[name]) for name, rotation in family.export().items()}


def shake(family: Turns, size: float = 0.2) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for part in family.parameters():
            if isinstance(family, Rotations):
                a = size * torch.randn_like(part)
                part.copy_(exp(a - a.mT))
            else:
                part.add_(size * torch.randn_like(part))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["layer", "residual"])
def test_shared_rotations_are_few_and_exported_for_every_tensor(kind: str, share: str):
    _, state = model_and_state()
    family = KINDS[kind](matrices(state), share=share)
    shake(family)
    adapted, exported = family(), family.export()
    assert list(adapted) == list(exported)
    for name, rotation in exported.items():
        torch.testing.assert_close(rotation.apply(state[name]), adapted[name], rtol=0, atol=1e-12)
    loss = torch.stack([weight.sum() for weight in adapted.values()]).sum()
    loss.backward()
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in family.parameters())
    if share == "residual":
        assert family.stacks == [("residual",)]
        q, o = (exported[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qo")
        assert q.left is None
        assert o.right is None
        torch.testing.assert_close(q.right.mT, o.left)  # type: ignore[union-attr]
    else:
        sizes = sorted(len(stack) for stack in family.stacks)
        assert sizes == [2, 2, 2]  # in 2 layers: q, o, gate, up on the right in 16; k, v left in 8; down left in 16
        q, up = (exported[f"model.layers.0.{x}_proj.weight"] for x in ("self_attn.q", "mlp.up"))
        assert torch.equal(q.right, up.right)  # type: ignore[arg-type]


def test_a_residual_rotation_with_embeddings_and_head_is_a_gauge_and_without_it_is_none(pair):
    model, state = model_and_state()
    whole = Rotations(matrices(state, "embedding", "head"), share="residual")
    shake(whole)
    assert kl_of(model, applied(whole, state), pair) < 1e-12
    part = Rotations(matrices(state), share="residual")
    part.assign([whole.rotations[0]])
    assert kl_of(model, applied(part, state), pair) > 0.01
    r = whole.rotations[0].detach()[0]
    for name, weight in residual_rotation(state, r).items():
        torch.testing.assert_close(applied(whole, state)[name], weight, rtol=0, atol=1e-12)
    gains = state | {name: 1 + 0.5 * torch.rand_like(w) for name, w in state.items() if "norm" in name}
    model.load_state_dict(gains)
    assert kl_of(model, applied(whole, gains), pair) > 0.01  # a gain does not commute with a rotation


def test_gauges_leave_the_logit_objective_at_zero(pair):
    model, state = model_and_state()
    assert kl_of(model, head_rotation(state, 0, 0, turned(8, 2.0, 0)), pair) < 1e-12
    assert kl_of(model, rope_rotation(state, 1, 0, torch.tensor([0.3, -1.0, 2.0, 0.1])), pair) < 1e-12
    assert kl_of(model, query_key_rotation(state, 0, 0, turned(8, 2.0, 0)), pair) > 1e-4


@pytest.mark.parametrize(
    ("share", "side", "block"), [("none", "left", 8), ("layer", "small", None), ("residual", "small", 8)]
)
def test_planted_shared_rotations_come_back_in_closed_form(share: str, side: str, block: int | None):
    _, state = model_and_state()
    family = Rotations(matrices(state), side=side, share=share, block=block)
    shake(family)
    planted = [part.detach().clone() for part in family.rotations]
    targets = {name: weight.detach() for name, weight in family().items()}
    found = family.closed_form(lambda name: [(1.0, targets[name], None)], anchor=0.0)
    assert found is not None
    for truth, stack, owners in zip(planted, found, family.stacks, strict=True):
        if share == "none" and any(x in owners[0] for x in ("gate", "up")):
            continue  # turned on their wide side, where the rotation is not unique
        torch.testing.assert_close(stack, truth, rtol=0, atol=1e-8)
    family.assign(found)
    for name, weight in family().items():
        torch.testing.assert_close(weight, targets[name], rtol=0, atol=1e-8)


def test_both_sides_have_no_closed_form():
    _, state = model_and_state()
    assert Rotations(matrices(state), side="both").closed_form(lambda name: [], anchor=0.0) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": "model"}, "align.share='model'; one of: none, layer, residual"),
        ({"share": "residual", "side": "left"}, "align.share=residual says itself where .* leave out align.side=left"),
        ({"side": "left"}, r"'up' would be rotated by a dense matrix in 5000 dimensions; use .*align.block=5000 asks"),
        ({"side": "left", "block": 3}, "align.block=3 does not divide the 5000 dimensions of 'up'"),
        ({"side": "left", "block": 0}, "align.block=0 does not divide"),
    ],
)
def test_what_can_not_be_shared_or_is_too_wide_is_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Rotations({"up": torch.zeros(5000, 4)}, **changes)


def test_a_wide_side_takes_blocks_or_low_rank_and_a_dense_rotation_when_asked():
    given = {"up": torch.zeros(5000, 4, device="meta")}
    shapes = [tuple(Rotations(given, side="left", block=block).rotations[0].shape) for block in (100, 5000)]
    assert shapes == [(1, 50, 100, 100), (1, 5000, 5000)]
    assert tuple(LowRankTurns(given, side="left").rotations[0].shape) == (1, 2, 5000, 4)


def test_what_is_not_known_to_read_or_write_is_named():
    with pytest.raises(ConfigError, match=r"align\.share=residual: whether 'layers\.0\.mixer\.weight' reads or writes"):
        Rotations({"layers.0.mixer.weight": torch.zeros(4, 4)}, share="residual")
