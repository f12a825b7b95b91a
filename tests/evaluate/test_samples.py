"""Samples survive kill -9 at any moment, and two processes that want the same ones. A child that speaks the engine's
protocol stands in for vLLM."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rotrl.evaluate.prompts import Prompt
from rotrl.evaluate.samples import Sampler, Wanted
from rotrl.evaluate.sampling import Sampling

WANTED = [
    Wanted("sums", f"p{i}", j, Prompt((i + 100,), f"{i:064}", thinks=False)) for i in range(25) for j in range(16)
]
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_engine_process import CHILD
from test_samples import sample
from rotrl.evaluate.engine import Engine
Engine._command = staticmethod(lambda: [sys.executable, "-c", CHILD])
print(*sample(Path({folder!r})), flush=True)
"""


def sample(folder: Path) -> tuple[int, int, int]:
    """Numbers of generated, reused and damaged samples, after all that is wanted has come."""
    sampler = Sampler(Sampling(1.0, 1.0, 0, 8, stop=("never",)), {"pause": 0.003}, folder, folder / "cache", seed=0)
    rows = dict(sampler.sample(folder, "weights", WANTED))
    assert set(rows) == set(WANTED)
    return sampler.generated, sampler.reused, sampler.damaged


@pytest.fixture
def start(tmp_path):
    def make(name: str) -> subprocess.Popen:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"max_position_embeddings": 64, "hidden_size": 1}')
        script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    return make


def counts(process: subprocess.Popen) -> list[int]:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return [int(number) for number in said.split()]


def rows(folder: Path) -> set[str]:
    return {line.split('"key":')[1] for file in folder.rglob("text/*.jsonl") for line in file.read_text().splitlines()}


def test_after_kills_at_random_moments_the_samples_are_those_of_an_uninterrupted_run(start, tmp_path):
    """Moments are shares of the samples, drawn anew by every run of this test; a share of 0 kills the start."""
    whole = start("whole")
    for share in sorted(random.choices(range(len(WANTED)), k=3)):
        process, stored = start("killed"), 0
        while stored < share and process.poll() is None:
            time.sleep(0.005)
            stored = len(rows(tmp_path / "killed"))
        process.kill()
        process.wait()
    generated, reused, damaged = counts(start("killed"))
    assert (generated + reused, damaged) == (len(WANTED), 0)
    assert counts(whole) == [len(WANTED), 0, 0]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_two_processes_at_once_leave_one_set_of_samples(start, tmp_path):
    assert [counts(process)[2] for process in [start("both"), start("both")]] == [0, 0]
    assert counts(start("both")) == [0, len(WANTED), 0]
    assert len(rows(tmp_path / "both")) == len(WANTED)
