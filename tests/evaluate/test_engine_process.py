"""The engine's process: deaths, killers among the prompts, its parent's death, its environment.

A child that speaks the engine's protocol stands in for vLLM, so that deaths can be had by the dozen.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rotrl.errors import EvaluationError
from rotrl.evaluate.engine import Engine
from rotrl.evaluate.engine_process import child_environment
from rotrl.evaluate.folder import signature
from rotrl.evaluate.sampling import Request, Sampling

CHILD = """
import os, random, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[-1]))
order = connection.recv()
fault = order["arguments"].get("stillborn")
if fault == "killed":
    os.kill(os.getpid(), 9)
if fault:
    print(fault, flush=True)
if said := order["arguments"].get("broken"):
    connection.send(("failed", said))
if fault or said:
    sys.exit(1)
connection.send(("ready", {"max_num_seqs": 16}))
queue = []
while True:
    while not queue or connection.poll():
        try:
            kind, *content = connection.recv()
        except EOFError:
            os._exit(0)
        if kind == "load":
            connection.send(("loaded",))
        else:
            queue += content[1]
    time.sleep(order["arguments"].get("pause", 0))
    index, ids, seed = queue.pop(0)
    if ids[0] == 13:
        os._exit(9)
    connection.send(("done", [(index, [seed], f"answer {seed}", "stop")]))
"""
LOG = """INFO 11-24 09:00:00 [core.py:93] Initializing a V1 LLM engine
(EngineCore_DP0 pid=71) ERROR 11-24 09:00:09 [core.py:842] EngineCore failed to start.
(EngineCore_DP0 pid=71) ERROR 11-24 09:00:09 [core.py:842] Traceback (most recent call last):
(EngineCore_DP0 pid=71) ERROR 11-24 09:00:09 [core.py:842]     torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.90 GiB.
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""  # noqa: E501  (as vLLM prints it)
SAMPLING = Sampling(1.0, 1.0, 0, 8, stop=("never",))  # with a stop text the child's text is taken


class Stand(Engine):
    @staticmethod
    def _command() -> list[str]:
        return [sys.executable, "-c", CHILD]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64, "hidden_size": 1}')
    return tmp_path


@pytest.fixture
def engine(model):
    made = []

    def make(**settings) -> Engine:
        made.append(Stand(model, settings={"log": str(model / "engine.log"), **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=[1, 3])
def engines(engine, request):
    """One engine, and three over one queue."""
    return lambda **settings: engine(data_parallel_size=request.param, **settings)


def requests(size: int, killers: set[int] = frozenset()) -> list[Request]:
    return [Request(f"key{i}", [13 if i in killers else i + 100], i) for i in range(size)]


def test_all_come_back_and_a_bounded_number_is_in_flight(engines):
    child = engines()
    most, seen = 0, []
    for completion in child.generate(requests(200), SAMPLING):
        most = max(most, *(len(process.live) for process in child._processes))
        seen.append((completion.key, completion.token_ids))
    assert sorted(seen) == sorted((f"key{i}", [i]) for i in range(200))
    assert most <= 32


@pytest.mark.parametrize("killers", [{0}, {99}, {40}, {7, 8}, {3, 50, 90}, set(range(100, 103))])
def test_killers_are_found_and_the_others_complete(engines, killers):
    found = {c.key: c.finish_reason for c in engines().generate(requests(103, killers), SAMPLING)}
    assert {key for key, reason in found.items() if reason == "failed"} == {f"key{i}" for i in killers}
    assert len(found) == 103


def test_engines_share_one_queue_and_a_slow_one_holds_up_no_other(engine):
    """Each answers with its own process id; one that is stopped gets no more than its window."""
    child = engine(data_parallel_size=2, pause=0.001)
    child.facts()
    os.kill(child.pids[1], signal.SIGSTOP)
    answered = []
    for completion in child.generate(requests(400), SAMPLING):
        answered.append(completion.key)
        if len(answered) == 368:  # all but the window of the stopped one
            os.kill(child.pids[1], signal.SIGCONT)
    assert sorted(answered) == sorted(f"key{i}" for i in range(400))


def test_too_many_deaths_end_with_one_line(engine):
    with pytest.raises(EvaluationError, match=r"vLLM died 17 times .*engine\.log"):
        list(engine().generate(requests(40, set(range(40))), SAMPLING))


def test_a_killed_engine_is_started_again_and_nothing_is_lost_or_doubled(engines):
    child = engines(pause=0.005)
    keys = []
    for completion in child.generate(requests(120), SAMPLING):
        keys.append(completion.key)
        if len(keys) in (20, 70):
            os.kill(child.pids[-1], signal.SIGKILL)
    assert sorted(keys) == sorted(f"key{i}" for i in range(120))


def test_an_engine_that_was_left_half_way_serves_the_next_caller(engines):
    child = engines(pause=0.001)
    for _ in child.generate(requests(50), SAMPLING):
        break
    assert sorted(c.key for c in child.generate(requests(5), SAMPLING)) == [f"key{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"broken": "ValueError: no such thing"}, "ValueError: no such thing"),
        ({"stillborn": "nothing to see"}, "its process ended with code 1"),
        ({"stillborn": "killed"}, "its process was killed, .* lower engine.max_num_seqs"),
        ({"stillborn": LOG}, r"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.90 GiB."),
        ({"stillborn": LOG, "broken": "RuntimeError: Engine core initialization failed. (...)"}, "torch.OutOf"),
    ],
)
def test_a_failed_start_is_one_line_with_the_cause_and_the_log(engine, fault, words):
    for _ in range(2):  # the second time too
        with pytest.raises(EvaluationError, match=rf"^vLLM did not start: {words}.*engine\.log\)$") as caught:
            list(engine(**fault).generate(requests(3), SAMPLING))
        assert "\n" not in str(caught.value)


def test_it_restarts_for_another_architecture_and_stays_for_the_same(engine, model):
    child = engine()
    child.facts()
    other, same = model / "other", model / "same"
    for folder, hidden in ((other, 2), (same, 1)):
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"max_position_embeddings": 64, "hidden_size": {hidden}}}')
        (folder / "model.safetensors").write_text("")
    first = child.pids
    child.load(same)
    assert child.pids == first
    child.load(other)
    second = child.pids
    assert second != first
    (other / "model.safetensors").write_text("new weights, same folder")
    assert child._loaded != signature(other)
    child.load(other)
    assert (child.pids, child._loaded) == (second, signature(other))


PARENT = """
import sys, time
from pathlib import Path
from rotrl.evaluate.engine import Engine
Engine._command = staticmethod(lambda: [sys.executable, "-c", {child!r}])
engine = Engine(Path({model!r}), settings={{"log": {log!r}}})
print(engine.facts() and engine.pids[0], flush=True)
time.sleep(60)
"""


def test_the_child_ends_with_a_killed_parent(model):
    script = PARENT.format(child=CHILD, model=str(model), log=str(model / "log"))
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break  # ended, and nobody waits for it in this process tree
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_the_environment_is_an_allow_list_without_secrets(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "VLLM_API_KEY", "MY_THING"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = child_environment(threads=1)
    assert "secret" not in found.values()
    assert {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items() <= found.items()
    assert {"VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "PATH"} <= found.keys()
