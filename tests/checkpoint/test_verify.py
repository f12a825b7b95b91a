"""verify finds any changed byte of any file, and folders whose files are as written but contradict each other."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rotrl.checkpoint import writer
from rotrl.checkpoint.header import INDEX
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.sidecar import copy_sidecars, write_config
from rotrl.checkpoint.staging import staging
from rotrl.checkpoint.verify import verify
from rotrl.checkpoint.writer import MANIFEST, valid_manifest, write_manifest, write_weights
from rotrl.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def merged(tensors, save, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_SIZE", 6000)
    model = open_checkpoint(save("source", tensors(0), vocab_size=32))
    with staging(tmp_path / "out") as folder:
        shapes = {name: info.shape for name, info in model.tensors.items()}
        sha256, files = write_weights(folder, shapes, torch.float32, model.read)
        copy_sidecars(model, folder, torch.float32)
        write_config(folder, {"merge": "linear"})
        write_manifest(folder, files, {"fingerprint": "f", "weights_sha256": sha256, "warnings": ["é"]})
    return tmp_path / "out"


def test_any_changed_byte_is_found_and_its_file_named(merged):
    files = sorted(merged.iterdir())
    assert {INDEX, MANIFEST, "config.json", "rotrl_config.yaml", "tokenizer.json"} < {file.name for file in files}
    verify(merged)

    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    @settings(max_examples=300)
    def check(file, place, mask):
        content = file.read_bytes()
        at = int(place * len(content))
        try:
            file.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
            with pytest.raises(CheckpointError, match=file.name):
                verify(merged)
            if file.name == MANIFEST:
                assert valid_manifest(merged) is None
        finally:
            file.write_bytes(content)

    check()
    verify(merged)


@pytest.mark.parametrize("at", range(8))
def test_a_header_length_beyond_all_memory_is_a_changed_byte(merged, at):
    file = next(merged.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:at] + bytes([content[at] ^ 0x7F]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=rf"{file.name}.* header has other bytes"):
        verify(merged)


@given(cut=st.integers(1, 200), more=st.binary(min_size=1, max_size=8))
@settings(max_examples=20)
def test_shorter_and_longer_files(cut, more, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    weights = {"a": torch.ones(100)}
    (folder / "config.json").write_text("{}")
    sha256, files = write_weights(folder, {"a": (100,)}, torch.float32, weights.__getitem__)
    write_manifest(folder, files, {"weights_sha256": sha256})
    content = (folder / "model.safetensors").read_bytes()
    for changed in (content[:-cut], content + more):
        (folder / "model.safetensors").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"'model\.safetensors' has \d+ bytes"):
            verify(folder)


def seal_again(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    del manifest["files"], manifest["manifest_sha256"]
    write_manifest(folder, {}, manifest)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_shards(folder):
    def change(content):
        names = sorted(content["weight_map"])
        first = content["weight_map"][names[0]]
        other = next(name for name in names if content["weight_map"][name] != first)
        content["weight_map"][names[0]] = content["weight_map"][other]

    edit(folder / INDEX, change)


def other_weights(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def add_head(folder):
    save_file({"lm_head.weight": torch.ones(32, 16)}, folder / "head.safetensors")
    edit(folder / INDEX, lambda c: c["weight_map"].update({"lm_head.weight": "head.safetensors"}))


CONTRADICTIONS = {
    "index against headers": (swap_shards, "differs from"),
    "weights against their hash": (other_weights, "the weights are not those of"),
    "untied config without a head": (
        lambda f: edit(f / "config.json", lambda c: c.update(tie_word_embeddings=False)),
        "no file holds a head",
    ),
    "tied config with another head": (add_head, "config.json ties them"),
    "vocab_size against rows": (lambda f: edit(f / "config.json", lambda c: c.update(vocab_size=40)), "has 32 rows"),
    "single file beside the index": (lambda f: save_file({}, f / "model.safetensors"), "remove one"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_contradict_each_other(case, merged):
    change, words = CONTRADICTIONS[case]
    change(merged)
    seal_again(merged)
    with pytest.raises(CheckpointError, match=words):
        verify(merged)
