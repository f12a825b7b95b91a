"""Every step of writing a checkpoint, failed in three ways: the target is absent or whole, the next run is equal."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rotrl.checkpoint import files, writer
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.sidecar import copy_sidecars, write_config
from rotrl.checkpoint.staging import staging
from rotrl.checkpoint.verify import verify
from rotrl.checkpoint.writer import write_manifest, write_weights
from rotrl.errors import CheckpointError

# Publishes argv[1] at argv[2] and dies at each step in turn, each time in a fresh process.
KILLER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, str(Path(sys.argv[3]).parent))
from test_failpoints import contents, files, publish, writer
source, target = Path(sys.argv[1]), Path(sys.argv[2])
overwrite = sys.argv[4] == "overwrite"
writer.SHARD_SIZE = 3000
for name in json.loads(sys.argv[5]):
    if (child := os.fork()) == 0:
        files.step = lambda reached: os.kill(os.getpid(), signal.SIGKILL) if reached == name else None
        publish(source, target, overwrite=overwrite)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
    print(json.dumps({"step": name, "found": contents(target)}), flush=True)
"""


def publish(source: Path, target: Path, *, overwrite: bool = False, extra: str = "") -> None:
    model = open_checkpoint(source)
    shapes = {name: info.shape for name, info in model.tensors.items()}
    with staging(target, overwrite=overwrite) as folder:
        sha256, hashes = write_weights(folder, shapes, torch.float32, model.read)
        copy_sidecars(model, folder, torch.float32)
        write_config(folder, {"merge": "linear", "extra": extra})
        write_manifest(folder, hashes, {"weights_sha256": sha256})


def contents(folder: Path) -> dict[str, str]:
    return {file.name: files.file_sha256(file) for file in sorted(folder.iterdir())} if folder.exists() else {}


@pytest.fixture
def source(tensors, save, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_SIZE", 3000)
    return save("source", tensors(0))


@pytest.fixture
def whole(source, tmp_path, monkeypatch):
    """What a run without fault leaves, and the names of all its steps."""
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "step", steps.append)
        publish(source, tmp_path / "reference", overwrite=True)
    assert len(steps) == len(set(steps)) > 40
    return contents(tmp_path / "reference"), steps


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize(
    ("code", "before"), [(errno.ENOSPC, "nothing"), (errno.ENOSPC, "an older one"), (errno.EIO, "an older one")]
)
def test_disk_that_fails_at_any_step(code, before, source, whole, tmp_path, monkeypatch):
    reference, steps = whole
    target = tmp_path / "place" / "out"
    for name in steps:
        old = {}
        if before != "nothing":
            publish(source, target, overwrite=True, extra="old")
            old = contents(target)

        def fail(reached: str, name: str = name) -> None:
            if reached == name:
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(files, "step", fail)
            with pytest.raises(CheckpointError, match=r"out: can't be written \(.*\); free the disk"):
                publish(source, target, overwrite=True)
        assert contents(target) in (old, reference), name
        publish(source, target, overwrite=True)
        assert contents(target) == reference, name
        assert not left_behind(target.parent), name
        for file in target.iterdir():
            file.unlink()
        target.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "overwrite"])
def test_killed_at_any_step(before, source, whole, tmp_path):
    reference, steps = whole
    target = tmp_path / "place" / "out"
    old = {}
    if before == "overwrite":
        publish(source, target, extra="old")
        old = contents(target)
    if before == "nothing":  # steps that only an overwriting run takes
        steps = [name for name in steps if name not in ("old moved aside", "published", "old removed")]
    arguments = [str(source), str(target), __file__, before, json.dumps(steps)]
    done = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines] == steps
    for line in lines:
        assert line["found"] in ({}, old, reference), line["step"]
    publish(source, target, overwrite=True)
    assert contents(target) == reference
    assert not left_behind(target.parent)


def test_real_limit_of_file_size(source, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_SIZE", 10**9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            publish(source, tmp_path / "place" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "place").iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_race_for_one_output(overwrite, source, whole, tmp_path):
    """Both start at once, from a common signal; one of them may lose, and the target is whole."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]);"
        "from rotrl.checkpoint.staging import AlreadyPublished;"
        "import test_failpoints as t; t.writer.SHARD_SIZE = 3000\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: t.publish(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=sys.argv[4] == 'True'); print('won')\n"
        "except AlreadyPublished: print('lost')"
    )
    target = tmp_path / "place" / "out"
    command = [sys.executable, "-c", code, str(source), str(target), str(Path(__file__).parent), str(overwrite)]
    runners = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for runner in runners:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "ready\n"
    told = [""] * 2

    def finish(i: int) -> None:
        out, error = runners[i].communicate("go\n", timeout=120)
        told[i] = out.strip() or error

    threads = [threading.Thread(target=finish, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "won" in told
    assert set(told) <= {"won", "lost"}
    assert contents(target) == whole[0]
    assert not left_behind(target.parent)


def test_target_on_another_filesystem_than_the_models(source, whole, tmp_path_factory):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == source.stat().st_dev:
        shared = tmp_path_factory.mktemp("same")  # a machine with one filesystem still tests the path
    target = shared / f"rotrl-test-{os.getpid()}"
    try:
        publish(source, target)
        assert contents(target) == whole[0]
    finally:
        for file in target.glob("*"):
            file.unlink()
        target.rmdir()


def test_read_only_place_is_one_line(source, tmp_path):
    """As an unprivileged user, whom permissions bind."""
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    code = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from rotrl.checkpoint.staging import staging\n"
        "os.getuid() or os.setuid(65534)\n"
        "with staging(Path(sys.argv[1])): pass"
    )
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    command = [sys.executable, "-c", code, str(place / "out"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CheckpointError" in done.stderr
    assert f"{place / 'out'}: can't be written (Permission denied)" in done.stderr
    assert not list(place.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_every_file_and_the_folder_have_the_mode_of_the_umask(mask, source, tmp_path):
    before = os.umask(mask)
    try:
        publish(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert verify(tmp_path / "out")
