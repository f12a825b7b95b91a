"""Bases on the disk: those of the SVD, made once whatever asks for them."""

import shutil
from collections import namedtuple

import pytest
import torch

import rotrl.evidence.bases as module
from rotrl.errors import ConfigError
from rotrl.evidence.bases import Bases
from rotrl.evidence.nulls import seeded
from rotrl.evidence.variants import DRAWN, SINGLE, SWAPS, Matrix
from rotrl.linalg.spectrum import basis


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5)])
def test_variants_are_those_of_a_decomposition_each(shape, tmp_path, monkeypatch):
    W0, D, made = random(*shape), 0.1 * random(*shape, seed=1), []
    monkeypatch.setattr(module, "basis", lambda W: made.append(W) or basis(W))
    bases = Bases(tmp_path)
    bases.reserve([shape], models=2)
    for name, variant in {**SINGLE, **DRAWN, **SWAPS}.items():
        kept = Matrix(W0, D, "small", decomposed=bases.of).update(variant, seeded(0, name))
        anew = Matrix(W0, D, "small").update(variant, seeded(0, name))
        assert torch.allclose(kept, anew, atol=1e-12), name
    assert len(made) == 2
    assert torch.equal(made[1].mT if shape[0] < shape[1] else made[1], W0 + D)
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    assert all(file.stat().st_size < 8 * min(shape) * (min(shape) + 1) + 300 for file in files)
    bases.remove()
    assert not tmp_path.exists()


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5)])
def test_a_matrix_that_lacks_rank_is_whole(shape, tmp_path):
    W0 = random(shape[0], 3) @ random(3, shape[1], seed=1)
    U, s, V = Bases(tmp_path).of("W", W0)
    assert (s > 0).sum() == 3
    assert torch.allclose(U * s @ V.mT, W0, atol=1e-12)


def test_a_disk_without_room_is_told_beforehand(tmp_path, monkeypatch):
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(1 << 40, 1 << 39, 2_000_000_000))
    Bases(tmp_path).reserve([(8960, 1536)] * 50, models=2)
    with pytest.raises(ConfigError, match=r"keeps up to 2\.6 GB of singular bases .* and 2\.0 GB are free"):
        Bases(tmp_path).reserve([(8960, 1536)] * 70, models=2)
