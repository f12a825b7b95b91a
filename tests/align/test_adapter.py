import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rotrl.align.fit import lora, stiefel
from rotrl.checkpoint.rotations import open_rotations
from rotrl.errors import ConfigError

HYPER = {"steps": 8, "batch": 8, "lr": 2e-2, "adapter": True}


@pytest.mark.parametrize(("function", "hyper"), [(stiefel, {"side": "right"}), (lora, {"rank": 3})])
def test_peft_gives_the_same_logits(function, hyper, call, pair, tmp_path: Path):
    base, _, _ = pair
    summary = call(function, tmp_path, source="base", **HYPER, **hyper)
    file = open_rotations(tmp_path / summary["rotations"])
    dense = AutoModelForCausalLM.from_pretrained(base.path)
    changed = {name: file.get(name).apply(base.read(name)) for name in file.names}  # type: ignore[union-attr]
    dense.load_state_dict(changed, strict=False)
    ids = torch.randint(23, (3, 9), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    with torch.no_grad():
        before = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
        expected = dense(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=0, atol=2e-5)
    assert (expected - before).abs().max() > 0.01


def test_what_is_no_adapter_is_refused_before_the_fit(call, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"align\.adapter.* not rotated on its inputs alone; use align\.side"):
        call(stiefel, tmp_path, side="left", **HYPER)
    assert not (tmp_path / "align.ckpt").exists()


def peft_logits(base, folder: Path, ids: torch.Tensor, residual: bool = False, **changes) -> torch.Tensor:
    """Of the base with the adapter, whose configuration `changes` alter."""
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    if residual:
        rest = load_file(folder / "residual.safetensors")
        plain.load_state_dict({name: base.read(name) + delta for name, delta in rest.items()}, strict=False)
    if changes:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with torch.no_grad():
        return PeftModel.from_pretrained(plain, folder)(ids).logits


def learned_logits(base, out: Path, ids: torch.Tensor) -> torch.Tensor:
    file = open_rotations(out / "rotations.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(base.path)
    state = {name: file.get(name).apply(base.read(name)) for name in file.names}  # type: ignore[union-attr]
    dense.load_state_dict(state, strict=False)
    with torch.no_grad():
        return dense(ids).logits


IDS = torch.randint(23, (3, 9), generator=torch.Generator().manual_seed(0))


def test_blocks_of_a_whole_rotation_need_the_residual_that_lies_beside(call, pair, tmp_path: Path):
    base, folder = pair[0], tmp_path / "adapter"
    call(stiefel, tmp_path, source="base", side="right", adapter_block=8, **HYPER)
    truth = learned_logits(base, tmp_path, IDS)
    torch.testing.assert_close(peft_logits(base, folder, IDS, residual=True), truth, rtol=0, atol=2e-5)
    assert (peft_logits(base, folder, IDS) - truth).abs().max() > 0.01
    rest = load_file(folder / "residual.safetensors")
    length = torch.stack([delta.double().square().sum() for delta in rest.values()]).sum().sqrt()
    assert f"length {float(length):.4g}" in (folder / "README.md").read_text()


def test_blocks_that_were_learned_as_such_are_exact(call, pair, tmp_path: Path):
    base = pair[0]
    call(stiefel, tmp_path, source="base", side="right", block=8, adapter_block=8, **HYPER)
    truth = learned_logits(base, tmp_path, IDS)
    torch.testing.assert_close(peft_logits(base, tmp_path / "adapter", IDS), truth, rtol=0, atol=2e-5)
    assert "0.0% of the whole change" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:The cayley-neumann parameterization")
def test_the_two_cayley_branches_of_peft_turn_in_opposite_directions(call, pair, tmp_path: Path):
    """What is written is for the exact branch; the Neumann branch needs -A, and with A it undoes the rotation."""
    base, folder = pair[0], tmp_path / "adapter"
    call(stiefel, tmp_path, source="base", side="right", **{**HYPER, "lr": 2e-3})
    truth = learned_logits(base, tmp_path, IDS)
    moved = float((truth - AutoModelForCausalLM.from_pretrained(base.path)(IDS).logits).norm().detach())
    neumann = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
    assert float((peft_logits(base, folder, IDS, **neumann) - truth).norm()) > 1.5 * moved
    entries = {name: -entry for name, entry in load_file(folder / "adapter_model.safetensors").items()}
    save_file(entries, folder / "adapter_model.safetensors")
    assert float((peft_logits(base, folder, IDS) - truth).norm()) < 0.01 * moved  # Neumann's series is cut off
    assert float((peft_logits(base, folder, IDS, use_cayley_neumann=False) - truth).norm()) > 1.5 * moved


def test_a_block_that_does_not_divide_is_refused_before_the_fit(call, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"align\.adapter_block=5 does not divide the 32 inputs of 'model"):
        call(stiefel, tmp_path, side="right", adapter_block=5, **HYPER)
    assert not (tmp_path / "align.ckpt").exists()
