"""GPU memory is given back before an engine asks for it."""

import subprocess
import sys
import weakref

import pytest
import torch

from rotrl.evaluate import engine
from rotrl.memory import free_gpu_memory


class Model:
    def __init__(self):
        self.itself = self


def test_what_cycles_hold_is_freed_before_the_cache_is(monkeypatch):
    held, alive = weakref.ref(Model()), []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: alive.append(held() is not None))
    free_gpu_memory()
    assert not torch.cuda.is_initialized()
    assert alive == []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    free_gpu_memory()
    assert alive == [False]


def test_torch_is_not_loaded_for_it():
    code = "import sys; from rotrl.memory import free_gpu_memory; free_gpu_memory(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("engines", [1, 2])
def test_before_every_start_of_an_engine(engines, tensors, save, monkeypatch):
    steps = []
    monkeypatch.setattr(engine, "free_gpu_memory", lambda: steps.append("freed"))
    monkeypatch.setattr(engine, "EngineProcess", lambda *_: steps.append("started"))
    settings = {"max_model_len": 64, "threads": 1, "data_parallel_size": engines}
    engine.Engine(save("model", tensors(0)), settings=settings)
    assert steps == ["freed", "started"] * engines
