"""Staging, shards, sidecars and verify: whole or absent, and no flipped byte passes."""

import json
import os

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rotrl.checkpoint import writer
from rotrl.checkpoint.files import whole_file
from rotrl.checkpoint.header import INDEX
from rotrl.checkpoint.reader import open_checkpoint, tensor_digest
from rotrl.checkpoint.sidecar import copy_sidecars, model_name, write_card
from rotrl.checkpoint.staging import AlreadyPublished, staging
from rotrl.checkpoint.verify import verify
from rotrl.checkpoint.writer import MANIFEST, shard_fault, valid_manifest, write_manifest, write_weights
from rotrl.errors import CheckpointError


@pytest.fixture
def source(tensors, save):
    return open_checkpoint(save("source", tensors(0)))


def publish(source, target, *, overwrite=False):
    shapes = {name: info.shape for name, info in source.tensors.items()}
    with staging(target, overwrite=overwrite) as folder:
        sha256, files = write_weights(folder, shapes, torch.float32, source.read)
        copy_sidecars(source, folder, torch.float32)
        write_manifest(folder, files, {"fingerprint": "f", "weights_sha256": sha256})
    return target


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=8), limit=st.integers(1, 200)
)
def test_shards_hold_every_tensor_once_and_hash_as_read(sizes, limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    weights = {f"t{i}": torch.randn(shape).bfloat16() for i, shape in enumerate(sizes)}
    (folder / "config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_SIZE", limit)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        sha256, files = write_weights(folder, shapes, torch.bfloat16, weights.__getitem__)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.sha256 == sha256
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in weights.items())
    assert {name: found for entry in files.values() for name, found in entry["blake3"].items()} == {
        name: tensor_digest(tensor).hex() for name, tensor in weights.items()
    }
    assert not any(shard_fault(folder / name, entry) for name, entry in files.items())
    assert {file.name for file in folder.iterdir()} - {INDEX} == {*files, "config.json"}


def test_shards_load_with_the_library_and_are_aligned(source, tmp_path):
    publish(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, source.read(name))


def test_index(source, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_SIZE", 2000)
    publish(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * source.read(name).numel() for name in source.tensors)
    assert set(index["weight_map"]) == set(source.tensors)
    assert verify(tmp_path / "out")["weights_sha256"] == source.sha256


def test_wrong_shape_or_dtype_is_a_bug(source, tmp_path):
    with pytest.raises(AssertionError), staging(tmp_path / "out") as folder:
        write_weights(folder, {"a": (2, 2)}, torch.float32, lambda _: torch.ones(3))
    assert not list(tmp_path.glob("*out*"))


def test_modes_follow_the_umask(source, tmp_path):
    before = os.umask(0o027)
    try:
        publish(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("model*")} == {0o640}


def test_staging_does_not_replace_what_appeared_meanwhile(source, tmp_path):
    with pytest.raises(AlreadyPublished), staging(tmp_path / "out"):
        publish(source, tmp_path / "faster").rename(tmp_path / "out")
    assert verify(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_overwriting_replaces_the_whole_folder(source, tmp_path):
    target = publish(source, tmp_path / "out")
    (target / "stale.safetensors").touch()
    publish(source, target, overwrite=True)
    assert not (target / "stale.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_unwritable_place_is_one_line(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't be written"):
        publish(source, tmp_path / "file" / "out")


def test_abandoned_staging_of_dead_processes_is_removed(source, tmp_path):
    host = os.uname().nodename
    dead, alive, foreign = (tmp_path / f".out.{who}.partial" for who in (f"{host}-4194304", f"{host}-1", "elsewhere-1"))
    replaced = tmp_path / f".out.{host}-4194304.old"
    for folder in (dead, alive, foreign, replaced):
        folder.mkdir()
    publish(source, tmp_path / "out")
    assert [folder.exists() for folder in (dead, replaced, alive, foreign)] == [False, False, True, True]


def test_whole_file(tmp_path):
    path = tmp_path / "f"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(TypeError), whole_file(path) as temporary:
        temporary.open("w").write(1)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_sidecars(source, tmp_path):
    (source.path / "chat_template.jinja").write_text("{{ messages }}")
    (source.path / "notes.txt").touch()
    copy_sidecars(source, tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {**source.config, "dtype": "bfloat16"}
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "notes.txt").exists()
    source.config["torch_dtype"] = source.config.pop("dtype")
    copy_sidecars(source, tmp_path, torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_card(source, tmp_path):
    write_card(
        tmp_path, title="out", method="ties", models=[source, source], configuration="merge:\n  density: 0.2\n",
        facts={"stored in": "float32"}, warnings=["a warning"],
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == ["source"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["merge", "rotrl", "ties"]
    for text in ("density: 0.2", "| stored in | float32 |", "- a warning"):
        assert text in card.content


def test_model_name(tmp_path):
    snapshot = tmp_path / "models--agentica-org--Deep--ScaleR" / "snapshots" / "abc"
    assert model_name(snapshot) == model_name(snapshot.parents[1]) == "agentica-org/Deep--ScaleR"
    assert model_name(snapshot, commit=True) == "agentica-org/Deep--ScaleR@abc"
    assert model_name(tmp_path / "DeepScaleR", commit=True) == "DeepScaleR"


def test_valid_manifest(source, tmp_path):
    target = publish(source, tmp_path / "out")
    assert valid_manifest(target)["fingerprint"] == "f"
    assert valid_manifest(tmp_path / "nowhere") is None
    with (target / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    assert valid_manifest(target) is None
    for text in ("", "[]", '{"files": 1}', '{"files": {"a": 1}}'):
        (target / MANIFEST).write_text(text)
        assert valid_manifest(target) is None


def test_verify_finds_every_flipped_byte(source, tmp_path):
    """One byte in each stretch of each file; a smaller step only takes longer."""
    target = publish(source, tmp_path / "out")
    verify(target)
    for file in sorted(target.iterdir()):
        content = file.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 12)):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            if file.name != MANIFEST:
                with pytest.raises(CheckpointError, match=file.name):
                    verify(target)
            elif verify_or_none(target) is not None:  # a byte that no check rests on, such as the fingerprint's
                assert json.loads(file.read_text())["files"] == json.loads(content)["files"]
        file.write_bytes(content)
    verify(target)


def verify_or_none(folder):
    try:
        return verify(folder)
    except CheckpointError:
        return None


def test_verify_lists_absent_extra_and_changed_files(source, tmp_path):
    target = publish(source, tmp_path / "out")
    (target / "config.json").unlink()
    (target / "extra.bin").touch()
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        verify(target)
    for text in ("'config.json' is absent", "'extra.bin' is not in the manifest", "'tokenizer.json' has 2 bytes"):
        assert text in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"files": {}}', '{"files": {"a": {}}, "weights_sha256": ""}'])
def test_verify_without_a_manifest(source, tmp_path, text):
    target = publish(source, tmp_path / "out")
    (target / MANIFEST).unlink() if text is None else (target / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify(target)
    with pytest.raises(CheckpointError, match="folder does not exist"):
        verify(tmp_path / "nowhere")


def test_verify_checks_values_and_weights(tensors, save, tmp_path):
    weights = tensors(0)
    weights["model.norm.weight"][0] = torch.nan
    broken = open_checkpoint(save("broken", weights))
    with staging(tmp_path / "out") as folder:
        shapes = {name: info.shape for name, info in broken.tensors.items()}
        sha256, files = write_weights(folder, shapes, torch.float32, broken.view)
        copy_sidecars(broken, folder, torch.float32)
        write_manifest(folder, files, {"weights_sha256": sha256})
    with pytest.raises(CheckpointError, match="NaN"):
        verify(tmp_path / "out")
