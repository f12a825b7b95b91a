"""What the choices about models and rounding do to a merged checkpoint."""

import pytest
import torch

from rotrl.checkpoint.family import open_family
from rotrl.checkpoint.verify import verify
from rotrl.errors import CheckpointError, ConfigError
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def linear():
    return bind({"_target_": "rotrl.merge.linear.linear", "_partial_": True}, ["math"])


def read(folder, name):
    from rotrl.checkpoint.reader import open_checkpoint

    return open_checkpoint(folder).view(name)


def test_rounding(tensors, save, linear, tmp_path):
    base = tensors(0)
    half = {name: tensor.bfloat16().float() for name, tensor in base.items()}
    expert = {name: tensor * (1 + 2**-12) for name, tensor in half.items()}  # far below bfloat16's steps of 2^-8
    family = open_family(save("base", half), {"math": save("math", expert)})
    for rounding in ("nearest", "stochastic"):
        merge(*family, linear, tmp_path / rounding, dtype="bfloat16", rounding=rounding)
        verify(tmp_path / rounding)
    assert torch.equal(read(tmp_path / "nearest", Q).float(), half[Q])
    moved = (read(tmp_path / "stochastic", Q).float() - half[Q]).sign() * half[Q].sign()
    assert 0 < moved.mean() < 0.25
    assert (moved >= 0).all()
    with pytest.raises(ConfigError, match=r"holds another merge \(other rounding\)"):
        merge(*family, linear, tmp_path / "nearest", dtype="bfloat16", rounding="stochastic")
    with pytest.raises(ConfigError, match="rounding is 'up', one of nearest, stochastic"):
        merge(*family, linear, tmp_path / "out", rounding="up")


def test_infinite_values_on_request(tensors, save, linear, tmp_path):
    weights = tensors(1)
    weights[Q][0, 0] = torch.inf
    folders = save("base", tensors(0)), {"math": save("math", weights)}
    with pytest.raises(CheckpointError, match=rf"tensor '{Q}' holds 1 NaN or Inf"):
        merge(*open_family(*folders), linear, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(*open_family(*folders, nonfinite="allow"), linear, tmp_path / "out")
    assert not read(tmp_path / "out", Q)[0, 0].isfinite()


def test_padded_and_untied_merge_is_whole(tensors, save, linear, tmp_path):
    longer = tensors(1)
    longer["model.embed_tokens.weight"] = torch.randn(40, 16)
    longer["lm_head.weight"] = torch.randn(40, 16)
    folders = (
        save("base", tensors(0), vocab_size=32),
        {"math": save("math", longer, vocab_size=40, tie_word_embeddings=False)},
    )
    with pytest.raises(CheckpointError, match=r"vocab=pad.*lm_head=tie or untie"):
        open_family(*folders)
    family = open_family(*folders, vocab="pad", lm_head="untie")
    merge(*family, linear, tmp_path / "out", dtype="float32")
    verify(tmp_path / "out")
    assert read(tmp_path / "out", "lm_head.weight").shape == (40, 16)
