"""A killed or interrupted merge goes on after its last whole shard, and ends in the bytes of one left in peace."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rotrl.checkpoint import files, writer
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.staging import JOURNAL, abandoned, finished, staging
from rotrl.checkpoint.verify import verify
from rotrl.errors import ConfigError
from rotrl.merge import stream
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge
from rotrl.merge.plan import plan_merge

EXPERTS = ["math", "code"]
LINEAR = bind({"_target_": "rotrl.merge.linear.linear"}, EXPERTS)
# Merges in argv[1] once for each step, each time in a fresh process, which dies there.
KILLER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, str(Path(sys.argv[2]).parent))
from test_resume import files, linear_of, stop_at, writer
writer.SHARD_SIZE = 3000
root, steps = Path(sys.argv[1]), json.loads(sys.argv[3])
for at, name in enumerate(steps):
    if (child := os.fork()) == 0:
        files.step = stop_at(name, steps[: at + 1].count(name), lambda: os.kill(os.getpid(), signal.SIGKILL))
        linear_of(root, root / "place" / str(at) / "out")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""


def linear_of(root, target, **options):
    models = {name: open_checkpoint(root / name) for name in ("base", *EXPERTS)}
    options = {"dtype": "float32", "device": "cpu", **options}
    return merge(models.pop("base"), models, LINEAR, target, **options)


def stop_at(name, number, action):
    """A failpoint that acts when the step is reached for the `number`-th time."""
    seen = [0]

    def step(reached):
        seen[0] += reached == name
        if reached == name and seen[0] == number:
            action()

    return step


@pytest.fixture
def root(tensors, save, monkeypatch):
    """A folder with base, math and code, whose merge has many shards."""
    monkeypatch.setattr(writer, "SHARD_SIZE", 3000)
    base = tensors(0)
    for name, seed in (("math", 1), ("code", 2)):
        save(name, tensors(seed, base=base))
    return save("base", base).parent


@pytest.fixture
def reference(root, monkeypatch):
    """A merge left in peace, and its steps."""
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "step", steps.append)
        linear_of(root, root / "reference" / "out")
    return root / "reference" / "out", steps


def contents(folder):
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir())}


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_killed_at_any_step_it_loses_one_shard_at_most(root, reference, monkeypatch):
    whole, steps = reference
    before = steps[: steps.index("folder synced") + 1]
    command = [sys.executable, "-c", KILLER, str(root), __file__, json.dumps(before)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    made = []
    measured = stream.Stream._measured
    tell = lambda self, name, *rest: made.append(name) or measured(self, name, *rest)  # noqa: E731
    monkeypatch.setattr(stream.Stream, "_measured", tell)
    journalled = [i for i, step in enumerate(steps) if step.endswith(".safetensors.json renamed")]
    assert len(journalled) > 3
    for at, name in enumerate(before):
        target = root / "place" / str(at) / "out"
        assert not target.exists()
        made.clear()
        linear_of(root, target)
        kept = sorted(whole.glob("model-*"))[: sum(place <= at for place in journalled)]
        assert sorted(made) == sorted(set(tensors_in(whole.glob("model-*"))) - set(tensors_in(kept))), name
        assert contents(target) == contents(whole), name
        assert not left_behind(target.parent), name
    verify(target)


def tensors_in(paths):
    return [
        name for path in paths for name in json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}") if name[0] != "_"
    ]


def interrupted(root, target, monkeypatch, name):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "step", stop_at(name, 1, interrupt))
        with pytest.raises(KeyboardInterrupt):
            linear_of(root, target)


def test_interrupted_with_a_changed_shard_or_another_configuration(root, reference, monkeypatch):
    whole, steps = reference
    target = root / "place" / "out"
    third = [step for step in steps if step.endswith(".safetensors written")][2]
    interrupted(root, target, monkeypatch, third)
    [left] = abandoned(target)
    assert len(list((left / JOURNAL).iterdir())) == 2
    first = sorted(left.glob("model*"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    linear_of(root, target)  # all anew: what follows a broken shard was counted with it
    assert contents(target) == contents(whole)
    assert not left_behind(target.parent)
    other = target.with_name("other")
    interrupted(root, other, monkeypatch, third)
    linear_of(root, other, dtype="bfloat16")
    verify(other)
    assert not left_behind(target.parent)


def test_shards_of_another_kind_of_device_are_made_again(root, reference, monkeypatch):
    whole, steps = reference
    target = root / "place" / "out"
    interrupted(root, target, monkeypatch, [step for step in steps if step.endswith(".safetensors written")][2])
    [left] = abandoned(target)
    for entry in (left / JOURNAL).iterdir():
        told = json.loads(entry.read_text())
        entry.write_text(json.dumps({**told, "key": told["key"].replace("cpu", "cuda")}))
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "step", written.append)
        linear_of(root, target)
    assert [step for step in written if step.endswith(".safetensors written")] == [
        step for step in steps if step.endswith(".safetensors written")
    ]
    assert contents(target) == contents(whole)
    assert not left_behind(target.parent)


def test_space_that_finished_shards_take_is_not_asked_for_again(root, reference, monkeypatch):
    whole, steps = reference
    target = root / "place" / "out"
    interrupted(root, target, monkeypatch, [step for step in steps if step.endswith(".safetensors written")][2])
    [left] = abandoned(target)
    kept = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
    needed = plan_merge(open_checkpoint(root / "base"), {}, LINEAR)["bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - kept - 1))
    with pytest.raises(ConfigError, match="GB are free"):
        linear_of(root, target)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - kept))
    linear_of(root, target)
    assert contents(target) == contents(whole)


def test_before_the_first_shard_and_on_errors_nothing_is_left(root, monkeypatch):
    target = root / "place" / "out"
    interrupted(root, target, monkeypatch, "staged")
    assert not left_behind(target.parent)

    def fail():
        with staging(target, key="k") as folder:
            (folder / JOURNAL).mkdir()
            (folder / JOURNAL / "a.json").write_text('{"key": "k"}')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not left_behind(target.parent)


def test_a_folder_of_a_living_process_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with staging(target, key="k") as folder:
        assert abandoned(target) == []
        living, before_us = (folder.with_name(folder.name.replace(*names)) for names in (
            (str(os.getpid()), str(os.getppid())), (folder.stem[-8:], "00000000"),
        ))  # fmt: skip
        living.mkdir()
        before_us.mkdir()
        assert abandoned(target) == [before_us]
        with staging(target, key="k"):
            assert (living.exists(), before_us.exists()) == (True, False)
        living.rmdir()
        assert finished(folder, "k") == {}


# Merges in argv[1] as a machine of its own; after the third shard it says so and waits to be told to go on.
OTHER_MACHINE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, str(Path(sys.argv[2]).parent))
from rotrl.checkpoint import staging
from test_resume import files, linear_of, stop_at, writer
staging.socket.gethostname = lambda: "node-a"
writer.SHARD_SIZE = 3000
wait = lambda: (print("ready", flush=True), sys.stdin.readline())
files.step = stop_at("model-00003-of-00008.safetensors.json renamed", 1, wait)
print(linear_of(Path(sys.argv[1]), Path(sys.argv[1]) / "place" / "out")["reused"])
"""


@pytest.mark.parametrize("lives", [False, True])
def test_another_machine_goes_on_and_the_first_is_not_disturbed(lives, root, reference, monkeypatch):
    whole, target = reference[0], root / "place" / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", OTHER_MACHINE, str(root), __file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    if not lives:
        first.kill()
        first.wait()
    [left] = target.parent.glob(".out.node-a-*.partial")
    before = {file: file_sha256(file) for file in left.rglob("*") if file.is_file()}
    made = []
    measured = stream.Stream._measured
    tell = lambda self, name, *rest: made.append(name) or measured(self, name, *rest)  # noqa: E731
    monkeypatch.setattr(stream.Stream, "_measured", tell)
    assert not linear_of(root, target)["reused"]
    assert sorted(made) == sorted(tensors_in(sorted(whole.glob("model-*"))[3:]))
    assert contents(target) == contents(whole)
    assert {file: file_sha256(file) for file in left.rglob("*") if file.is_file()} == before
    if lives:
        out, error = first.communicate("go\n", timeout=100)
        assert out == "True\n", error  # it finds the same merge done
        assert not left_behind(target.parent)
    assert contents(target) == contents(whole)
    verify(target)


def test_whole_tensors_on_three_devices_in_turn_are_those_of_one(root, monkeypatch):
    models = {name: open_checkpoint(root / name) for name in ("base", *EXPERTS)}
    base, tsv_m = models.pop("base"), bind({"_target_": "rotrl.merge.subspace.tsv_m"}, EXPERTS)
    for name, devices in (("one", ["cpu"]), ("three", ["cpu:0"] * 3)):
        monkeypatch.setattr("rotrl.merge.engine.devices", lambda _, devices=devices: devices)
        merge(base, models, tsv_m, Path(root) / name / "out", dtype="float32")
    assert contents(root / "one" / "out") == contents(root / "three" / "out")


def test_device_that_is_not_there():
    with pytest.raises(ConfigError, match=r"device is 'cuda:99', one of auto, cpu.* is expected"):
        stream.devices("cuda:99")
    assert stream.devices("cpu") == ["cpu"]
