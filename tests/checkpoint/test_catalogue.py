"""The catalogue of bad checkpoints, generated: each is refused by its file and tensor, inputs and output untouched."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotrl.checkpoint.family import open_family
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.header import INDEX
from rotrl.checkpoint.staging import staging
from rotrl.checkpoint.writer import write_weights
from rotrl.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-00002-of-00003.safetensors"
QUIET = ("evidence=none", "align=none", "evaluation=none", "logger=none")
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda content: content.update(changes))


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / INDEX, lambda content: change(content["weight_map"]))


def shard(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / SHARD).write_bytes(content)


def header(content: dict | bytes, tail: int) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + bytes(tail)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """One file in place of the shards, with its tensors changed."""

    def apply(folder: Path) -> None:
        tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for file in (*folder.glob("*.safetensors"), folder / INDEX):
            file.unlink()
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return apply


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name: change(tensors[name])}))


def elsewhere(weight_map: dict) -> None:
    weight_map[Q] = next(file for file in weight_map.values() if file != weight_map[Q])


def rename(new: str) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({new: tensors.pop(Q)}))


def fill(value: float) -> Callable[[Path], None]:
    return put(Q, lambda tensor: tensor.index_fill(0, torch.tensor([1]), value))


def second_copy(folder: Path) -> None:
    file = next(path for path in sorted(folder.glob("*.safetensors")) if Q not in load_file(path))
    save_file({**load_file(file), Q: torch.ones(16, 16)}, file)


def link_out(folder: Path) -> None:
    outside = shutil.move(folder / SHARD, folder.parent / "outside.safetensors")
    (folder / SHARD).symlink_to(outside)


def pickled(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").touch()


def huge_header(folder: Path) -> None:
    with (folder / SHARD).open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(100_000_100)


def tokenizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer.json", change)


def swap(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.ones(32, 16)


CATALOGUE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated shard": (lambda f: os.truncate(f / SHARD, 900), (SHARD, "not a whole safetensors file")),
    "empty shard": (shard(b""), (SHARD, "only 0 bytes")),
    "header length 0": (shard(bytes(8)), (SHARD, "not a whole safetensors file")),
    "header length 2^40": (shard((2**40).to_bytes(8, "little") + b"{}"), (SHARD, "header is longer than the file")),
    "header of 100 MB": (huge_header, (SHARD, "its header is 100 MB")),
    "header is no JSON": (shard(header(b"{{{{{{{", 0)), (SHARD, "invalid JSON")),
    "pickle": (shard(b"\x80\x04" + bytes(100)), (SHARD, "looks like a pickle")),
    "zipped pickle": (shard(b"PK\x03\x04" + bytes(100)), (SHARD, "looks like a pickle")),
    "LFS pointer": (shard(b"version https://git-lfs.github.com/spec/v1\n"), (SHARD, "Git LFS pointer")),
    "HTML page": (shard(b"<!DOCTYPE html><html></html>"), (SHARD, "HTML page")),
    "key twice in a header": (
        shard(header(b'{"a":%b,"a":%b}' % ((json.dumps(ONE).encode(),) * 2), 4)),
        (SHARD, "'a' occurs twice"),
    ),
    "key twice in config.json": (
        lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'),
        ("config.json", "twice"),
    ),
    "key twice in the index": (lambda f: (f / INDEX).write_text('{"a": 1, "a": 2}'), (INDEX, "'a' occurs twice")),
    "gap between tensors": (shard(header({"a": {**ONE, "data_offsets": [4, 8]}}, 8)), (SHARD, "not a whole")),
    "absent shard": (lambda f: (f / SHARD).unlink(), (SHARD, "does not exist", "tensor '")),
    "tensor of the wrong shard": (index(elsewhere), (Q, "absent", "not in the index")),
    "tensor in two shards": (second_copy, (Q, "not in the index")),
    "tensor in no shard": (
        index(lambda m: m.update({"model.new.weight": SHARD})),
        (SHARD, "'model.new.weight' is absent"),
    ),
    "parent folder in the index": (
        index(lambda m: m.update({Q: "../x.safetensors"})),
        (INDEX, Q, "not a plain file name"),
    ),
    "absolute path in the index": (
        index(lambda m: m.update({Q: "/x.safetensors"})),
        (INDEX, Q, "not a plain file name"),
    ),
    "NUL in the index": (index(lambda m: m.update({Q: "x\0.safetensors"})), (INDEX, Q, "not a plain file name")),
    "backslash in the index": (index(lambda m: m.update({Q: "a\\x.safetensors"})), (INDEX, Q, "not a plain file name")),
    "number in the index": (index(lambda m: m.update({Q: 3})), (INDEX, "does not exist")),
    "link out of the folder": (link_out, (SHARD, "is a link out of its folder")),
    "single file and index": (
        lambda f: shutil.copy(f / SHARD, f / "model.safetensors"),
        ("model.safetensors", INDEX, "remove one"),
    ),
    "pickle in place of safetensors": (pickled, ("pytorch_model.bin, a pickle",)),
    "code of its own": (config(auto_map={"AutoModel": "m.py"}), ("config.json", "auto_map", "never run")),
    "GPTQ": (config(quantization_config={"quant_method": "gptq"}), ("config.json", "gptq", "unquantised")),
    "AWQ": (config(quantization_config={"quant_method": "awq"}), ("config.json", "awq", "unquantised")),
    "GPTQ told by its tensors": (rename("model.layers.0.self_attn.q_proj.qweight"), ("q_proj.qweight", "quantised")),
    "int4 codes": (put(Q, lambda w: w.to(torch.uint8)), ("model.safetensors", Q, "U8", "unquantised")),
    "fp8": (put(Q, lambda w: w.to(torch.float8_e4m3fn)), ("model.safetensors", Q, "F8_E4M3")),
    "missing tensor": (weights(lambda w: w.pop(Q)), ("expert", Q, "is missing")),
    "extra tensor": (
        weights(lambda w: w.update({"model.extra.weight": torch.ones(2)})),
        ("model.extra.weight", "not in the base"),
    ),
    "transposed tensor": (
        put("model.layers.1.mlp.up_proj.weight", torch.Tensor.t),
        ("up_proj", "[16, 24]", "[24, 16]"),
    ),
    "other shape": (put(Q, lambda w: w[:8]), (Q, "[8, 16]", "[16, 16]")),
    "other layers": (config(num_hidden_layers=3), ("config num_hidden_layers=3, base has 2",)),
    "other heads": (config(num_attention_heads=8), ("config num_attention_heads=8",)),
    "other rope": (config(rope_theta=5e5), ("config rope", "500000.0", "10000.0")),
    "other activation": (config(hidden_act="gelu"), ("config hidden_act='gelu'",)),
    "other architecture": (config(model_type="llama"), ("config model_type='llama'",)),
    "padded vocabulary": (
        put("model.embed_tokens.weight", lambda w: torch.cat([w, w[:4]])),
        ("embed_tokens", "[36, 16]", "vocab=pad"),
    ),
    "permuted tokenizer": (tokenizer(swap), ("tokenizer.json", "'a' 1 (base 0)")),
    "tokenizer with another token": (
        tokenizer(lambda c: c["added_tokens"].append({"content": "<think>", "id": 26})),
        ("'<think>' (expert only)", "tokenizer_from"),
    ),
    "untied beside tied": (
        lambda f: (config(tie_word_embeddings=False)(f), weights(head)(f)),
        ("lm_head.weight", "lm_head=tie or untie"),
    ),
    "head that contradicts a tied config": (weights(head), ("config.json ties them", "lm_head.weight")),
    "no head and not tied": (config(tie_word_embeddings=False), ("config.json", "no file holds a head")),
    "NaN": (fill(math.nan), (Q, "NaN or Inf", "nonfinite=allow")),
    "Inf": (fill(math.inf), (Q, "NaN or Inf", "nonfinite=allow")),
    "absent config.json": (lambda f: (f / "config.json").unlink(), ("config.json", "does not exist")),
    "broken config.json": (lambda f: (f / "config.json").write_text("{"), ("config.json", "not readable as JSON")),
    "slash in a tensor's name": (rename("model/q.weight"), ("'model/q.weight'", "a name that no module has")),
    "'..' in a tensor's name": (rename("model..q.weight"), ("'model..q.weight'", "a name that no module has")),
    "newline in a tensor's name": (rename("model\nq.weight"), (r"'model\nq.weight'", "a name that no module has")),
}


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(file): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def copy(base: Path, expert: Path, target: Path) -> None:
    """What every merge does with its inputs: opens the family, then reads every tensor."""
    root, models = open_family(base, {"expert": expert})
    with staging(target) as folder:
        shapes = {name: info.shape for name, info in root.tensors.items()}
        write_weights(folder, shapes, torch.float32, models["expert"].read)


@pytest.fixture
def pair(tensors, save):
    settings = {"rope_theta": 1e4, "hidden_act": "silu", "num_attention_heads": 4}
    return save("base", tensors(0), shards=3, **settings), save("expert", tensors(1), shards=3, **settings)


@pytest.mark.parametrize("case", CATALOGUE)
def test_bad_checkpoint_is_refused(case, pair, typed, tmp_path):
    spoil, words = CATALOGUE[case]
    copy(*pair, tmp_path / "good")
    shutil.rmtree(tmp_path / "good")
    spoil(pair[1])
    before = bytes_of(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        copy(*pair, tmp_path / "out")
    text = str(caught.value)
    assert "\n" not in text
    assert str(pair[1]) in text
    for word in words:
        assert word in text
    assert bytes_of(tmp_path) == before
    assert not (tmp_path / "out").exists()
    code, line = typed(*QUIET, *models(pair), "merge=linear", f"output={tmp_path}/out", f"run_dir={tmp_path}/run")
    assert (code, line.count("\n")) == (2, 1), line
    assert line.startswith("error: ")
    for word in (str(pair[1]), *words):
        assert word in line
    assert {**bytes_of(tmp_path), **before} == bytes_of(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "expert", "outside.safetensors", "run"}
    # Only what a weight's value tells is found after the run has begun.
    assert (tmp_path / "run").exists() == (case in ("NaN", "Inf"))


def models(pair):
    return ("models=custom", f"models.base={pair[0]}", f"models.experts={{expert: {pair[1]}}}")


def test_all_faults_of_all_models_are_told_at_once(pair, tensors, save):
    third = save("third", tensors(2))
    for number in (1, 2, 3):
        os.truncate(pair[1] / f"model-0000{number}-of-00003.safetensors", 100)
    config(auto_map={})(pair[1])
    (third / "model.safetensors").write_bytes(b"<html>")
    pickled(pair[0])
    with pytest.raises(CheckpointError) as caught:
        open_family(pair[0], {"math": pair[1], "code": third})
    text = str(caught.value)
    for word in ("base: ", "a pickle", "math: ", "auto_map", "00001-of", "00002-of", "00003-of", "code: ", "HTML page"):
        assert word in text


def test_file_changed_while_it_is_read(pair):
    root, _ = open_family(pair[0], {"expert": pair[1]})
    file = root.tensors[Q].file
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: tensor '{Q}': the file changed while it was used"):
        root.read(Q)
