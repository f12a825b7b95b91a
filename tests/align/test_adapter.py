from pathlib import Path

import pytest
import torch
from peft import PeftModel
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
