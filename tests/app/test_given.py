"""Rotations that files give to a merge: checked before anything runs, and part of what names the run."""

import pytest
import torch
from omegaconf import OmegaConf

from rotrl import config
from rotrl.app.prepare import prepare
from rotrl.checkpoint.rotations import Rotation, save_rotations
from rotrl.errors import ConfigError
from rotrl.linalg.rotation import exp

Q = "model.layers.0.self_attn.q_proj.weight"


def composed(path) -> dict:
    chosen = ["evidence=none", "align=none", "evaluation=none", "merge=lie_sum"]
    found = config.compose([*chosen, f"merge.rotations={{math: {path}, code: {path}}}"])
    return OmegaConf.to_container(found, resolve=True)  # type: ignore[return-value]


def write(path, size: float, d: int) -> None:
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    save_rotations(path, {Q: Rotation(right=exp(size * (a - a.mT)))}, {"source": '{"model": "base"}'})


def test_files_are_checked_before_anything_runs_and_name_the_run(tmp_path):
    path = tmp_path / "rotations.safetensors"
    with pytest.raises(ConfigError, match=r"merge\.rotations: .*rotations file does not exist"):
        prepare(composed(path))
    write(path, 0.1, 5)
    with pytest.raises(ConfigError, match=rf"'{Q}\.right' turns 5 dimensions"):
        prepare(composed(path))
    digests = []
    for size in (0.1, 0.2, 0.1):
        write(path, size, 96)
        digests.append(prepare(composed(path)).digest)
    assert digests[0] == digests[2] != digests[1]
