"""What only a run can meet, through the command line: values, files that change, disks that fill, spoilt outputs."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotrl.checkpoint import files, writer
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.verify import verify
from rotrl.checkpoint.writer import MANIFEST

QUIET = ("evidence=none", "evaluation=none", "logger=none")
Q = "model.layers.0.self_attn.q_proj.weight"
ROTATIONS = (
    "orthomerge",
    "lie_sum",
    "sequential",
    "lie_mean",
    "geodesic",
    "chordal",
    "karcher_rotation",
    "split_task_arithmetic",
)


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(file): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def trio(tensors, save) -> Callable[..., Path]:
    """trio(change) writes base, math and code and gives their folder; `change(base, math, code)` edits tensors."""

    def make(change: Callable[..., object] = lambda *_: None, size: float = 0.05) -> Path:
        base = tensors(0)
        models = [dict(base), tensors(1, base=base, size=size), tensors(2, base=base, size=size)]
        change(*models)
        folders = [save(name, weights) for name, weights in zip(("base", "math", "code"), models, strict=True)]
        return folders[0].parent

    return make


def merge(folder: Path, *arguments: str) -> list[str]:
    models = [f"models.base={folder}/base", f"models.experts={{math: {folder}/math, code: {folder}/code}}"]
    quiet = [] if any(argument.startswith("align=") for argument in arguments) else ["align=none"]
    places = [f"output={folder}/out", f"run_dir={folder}/run", f"cache_dir={folder}/cache"]
    return ["models=custom", *models, *QUIET, *quiet, *places, *arguments]


def negated(base, math, code):
    math.update({name: base[name].clone() for name in math})
    code.update({name: -tensor for name, tensor in base.items()})


def reflected(base, math, code):
    """math is a mirror image of the base in one tensor, so that the nearest orthogonal matrix has determinant -1."""
    mirror = torch.eye(16)
    mirror[0, 0] = -1
    math.update({name: base[name].clone() for name in math} | {Q: base[Q] @ mirror})


def infinite(base, math, code):
    code[Q][3, 3] = torch.inf


REFUSED = {  # what is done to the weights, the command, what is said
    "antipodal": (negated, ["merge=slerp"], ["merge=slerp: tensor 'model.embed_tokens.weight'", "opposite"]),
    "mirror image, aligned": (
        reflected, ["merge=learned", "align=procrustes", "align.anchor=0", "align.teachers=[math]"],
        [Q, "reflection (determinant -1)", "raise align.anchor"]),
    "mirror image, merged": (reflected, ["merge=orthomerge", "merge.anchor=0"],
                             ["merge=orthomerge: tensor 'model.", "reflection", "use a larger anchor"]),
    "overflow on the cast": (lambda *_: None, ["merge=task_arithmetic", "merge_scale=1e6", "dtype=float16"],
                             ["tensor 'model.", "values overflow float16; use dtype=float32"]),
    "Inf": (infinite, ["merge=linear"], ["code/model.safetensors", Q, "1 NaN or Inf of 256", "nonfinite=allow"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_no_merge_can_use_are_named(case, trio, typed, tmp_path) -> None:
    change, arguments, words = REFUSED[case]
    folder = trio(change)
    before = bytes_of(folder)
    code, line = typed(*merge(folder, *arguments))
    assert (code, line.count("\n")) == (2, 1), line
    assert all(word in line for word in words), line
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))
    assert bytes_of(folder).items() >= before.items()


def without_rank(base, math, code):
    """One matrix of zeros, one of rank 1, in the base; the experts change both within and beyond their range."""
    before = {name: tensor.clone() for name, tensor in base.items()}
    base[Q] = torch.zeros(16, 16)
    up = "model.layers.1.mlp.up_proj.weight"
    base[up] = base[up][:, :1] @ base[up][:1]
    for expert in (math, code):
        expert |= {name: base[name] + expert[name] - before[name] for name in (Q, up)}


@pytest.mark.parametrize("method", ROTATIONS)
def test_zero_and_rank_deficient_matrices_have_a_merge(method, trio, typed) -> None:
    """A rotation is the identity where nothing tells it, so that what the experts agree on comes out of all methods but
    those that shrink what no rotation explains."""
    folder = trio(without_rank)
    shutil.rmtree(folder / "code")
    shutil.copytree(folder / "math", folder / "code")
    scale = {"geodesic": "merge.t=0.5", "lie_sum": "merge_scale=mean", "sequential": "merge_scale=mean"}.get(
        method, "merge_scale=1"
    )
    code, line = typed(*merge(folder, f"merge={method}", scale))
    assert code == 0, line
    merged, math = (open_checkpoint(folder / name) for name in ("out", "math"))
    for name in math.tensors:
        assert merged.read(name).isfinite().all(), name
        if method not in ("orthomerge", "split_task_arithmetic"):
            torch.testing.assert_close(merged.read(name), math.read(name), rtol=0, atol=1e-5)
    verify(folder / "out")


def at(step: str, action: Callable[[], object]) -> Callable[[str], None]:
    """A failpoint that acts once, when the first step that ends in `step` is reached."""
    waiting = [action]

    def reached(name: str) -> None:
        if name.endswith(step) and waiting:
            waiting.pop()()

    return reached


@pytest.mark.parametrize("step", ["staged", f"holds {Q}"])
@pytest.mark.parametrize("name", ["base", "code"])
def test_a_model_that_changes_under_the_merge(step, name, trio, typed, monkeypatch) -> None:
    folder = trio()
    file = folder / name / "model.safetensors"

    def change() -> None:
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)

    monkeypatch.setattr(files, "step", at(step, change))
    code, line = typed(*merge(folder, "merge=linear"))
    assert (code, line.count("\n")) == (2, 1), line
    # Bytes are written behind: all other tensors may be merged by then, which leaves it to the check at the end.
    assert f"{file}: tensor '" in line or step != "staged"
    assert line.startswith(f"error: {file}: ")
    assert line.endswith("the file changed while it was used; run again\n")
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))
    assert typed(*merge(folder, "merge=linear"), "overwrite=true")[0] == 0


@pytest.mark.parametrize("step", ["model.safetensors written", "config.json written", "folder synced"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_ends_the_run_in_one_line(code, step, trio, typed, monkeypatch) -> None:
    folder = trio()

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(files, "step", at(step, fail))
        ended, line = typed(*merge(folder, "merge=linear"))
    assert (ended, line.count("\n")) == (2, 1), line
    assert f"{folder}/out: can't be written ({os.strerror(code)}); free the disk or choose another output" in line
    assert not (folder / "out").exists()
    assert typed(*merge(folder, "merge=linear"))[0] == 0


def test_a_stage_that_has_no_room_ends_the_run_in_one_line(trio, typed) -> None:
    folder = trio()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        code, line = typed(*merge(folder, "merge=linear", "evidence=lineage"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, line.count("\n")) == (2, 1), line
    assert "File too large" in line
    assert not (folder / "out").exists()


# Once as it is, so that all is imported that may lie where nobody else may read; then without rights.
AS_NOBODY = """
import os, sys
from rotrl import __main__ as program
given = sys.argv[1:]
for sys.argv[1:] in (given[:-3], given):
    try:
        program.main()
    except SystemExit as ended:
        code = ended.code
    os.getuid() or os.setuid(65534)
sys.exit(code)
"""


def test_places_that_may_not_be_written_are_told_in_the_plan(trio) -> None:
    """As an unprivileged user, whom permissions bind."""
    folder = trio()
    (folder / "locked").mkdir(mode=0o555)
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    for file in folder.glob("*/*.safetensors"):
        file.chmod(0o644)
    places = [f"{key}={folder}/locked/x" for key in ("output", "run_dir", "cache_dir")]
    command = [sys.executable, "-c", AS_NOBODY, *merge(folder, "merge=linear", "plan_only=true"), *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    for place in places:
        assert f"{place}: {folder}/locked can't be written; choose another {place.split('=')[0]}" in done.stderr
    assert not list((folder / "locked").iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def shard(number: int) -> str:
    return f"model-0000{number}-of-00008.safetensors"


def exchange(folder: Path) -> None:
    (folder / shard(1)).rename(folder / "x")
    (folder / shard(2)).rename(folder / shard(1))
    (folder / "x").rename(folder / shard(2))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a shard": (lambda f: flip(f / shard(2)), f"'{shard(2)}': tensor '"),
    "a bit of the config": (lambda f: flip(f / "config.json"), "'config.json' has other bytes"),
    "a bit of the manifest": (lambda f: flip(f / MANIFEST), MANIFEST),
    "a shard cut short": (lambda f: os.truncate(f / shard(1), 99), f"'{shard(1)}' has 99 bytes"),
    "a shard too few": (lambda f: (f / shard(3)).unlink(), f"'{shard(3)}' is absent"),
    "a file too many": (lambda f: (f / "pytorch_model.bin").touch(), "'pytorch_model.bin' is not in the manifest"),
    "weights beside": (lambda f: save_file({}, f / "model.safetensors"), "'model.safetensors' is not in the manifest"),
    "two shards exchanged": (exchange, f"'{shard(1)}'"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST}: does not exist"),
    "no folder": (shutil.rmtree, "folder does not exist"),
}


def test_verify_tells_each_kind_of_spoilt_folder(trio, typed, monkeypatch) -> None:
    monkeypatch.setattr(writer, "SHARD_SIZE", 3000)
    folder = trio()
    assert typed(*merge(folder, "merge=linear"))[0] == 0
    assert typed(f"verify={folder}/out")[0] == 0
    for case, (spoil, words) in SPOILT.items():
        shutil.copytree(folder / "out", folder / "spoilt")
        spoil(folder / "spoilt")
        before = bytes_of(folder)
        code, line = typed(f"verify={folder}/spoilt")
        assert (code, line.count("\n")) == (2, 1), (case, line)
        assert f"{folder}/spoilt" in line
        assert words in line, (case, line)
        assert bytes_of(folder) == before
        shutil.rmtree(folder / "spoilt", ignore_errors=True)


def test_a_merge_with_a_flipped_bit_is_no_expert(trio, typed) -> None:
    folder = trio()
    assert typed(*merge(folder, "merge=linear"))[0] == 0
    (folder / "out").rename(folder / "merged")
    again = ["models=custom", f"models.base={folder}/base", f"models.experts={{merged: {folder}/merged}}", *QUIET]
    again += ["align=none", "merge=linear", f"output={folder}/out", f"run_dir={folder}/again"]
    flip(folder / "merged/model.safetensors")
    code, line = typed(*again)
    assert (code, line.count("\n")) == (2, 1), line
    assert f"merged: {folder}/merged: the weights are not those of {MANIFEST}" in line
    assert not (folder / "again").exists()
    flip(folder / "merged/model.safetensors")
    assert typed(*again)[0] == 0
