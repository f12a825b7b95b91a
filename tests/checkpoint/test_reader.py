"""The reader on sound checkpoints and on a corpus of broken ones: one line that names the file and what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotrl.checkpoint.header import INDEX
from rotrl.checkpoint.reader import check_family, open_checkpoint
from rotrl.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def single(tensors, save):
    return save("single", tensors(0))


@pytest.fixture
def sharded(tensors, save):
    return save("sharded", tensors(0), shards=3)


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_as_stored(tensors, save, dtype, shards):
    weights = {**tensors(0), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    checkpoint = open_checkpoint(save("model", weights, dtype=dtype, shards=shards))
    assert list(checkpoint.tensors) == sorted(weights)
    assert checkpoint.config["hidden_size"] == 16
    for name, tensor in weights.items():
        info, read = checkpoint.tensors[name], checkpoint.read(name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), dtype)
        assert torch.equal(read, tensor.to(dtype))


def test_read_gives_its_own_copy(single):
    checkpoint = open_checkpoint(single)
    checkpoint.read(Q).zero_()
    assert checkpoint.read(Q).abs().sum() > 0


def test_sha256_is_of_the_weights_not_of_the_files(tensors, save):
    weights = tensors(0)
    hashes = {open_checkpoint(save(f"s{shards}", weights, shards=shards, note=shards)).sha256 for shards in (1, 2, 3)}
    assert len(hashes) == 1
    for i, (name, change) in enumerate(
        [(Q, lambda w: w + torch.eye(16) * 1e-6), (Q, torch.Tensor.flatten), (Q, torch.Tensor.half), (None, None)]
    ):
        other = {key: change(tensor) if key == name else tensor for key, tensor in weights.items()}
        if name is None:
            other["new"] = other.pop(Q)
        folder = save(f"other{i}", weights)
        save_file({key: tensor.contiguous() for key, tensor in other.items()}, folder / "model.safetensors")
        assert open_checkpoint(folder).sha256 not in hashes


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(value, dtype, tensors, save):
    weights = tensors(0)
    weights[Q][2, 3] = value
    checkpoint = open_checkpoint(save("model", weights, dtype=dtype))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{Q}' holds 1 NaN or Inf of 256 values"):
        checkpoint.read(Q)
    checkpoint.read("model.norm.weight")


def test_absent_folder_and_file_in_its_place(tmp_path, single):
    assert "does not exist; give a local folder with config.json" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(single / "config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("{", "not readable as JSON"), ("[1]", "a JSON object is expected"),
     ('{"a": 1, "a": 2}', "key 'a' occurs twice"), ('{"quantization_config": {}}', "quantised")],
)  # fmt: skip
def test_config(single, text, words):
    (single / "config.json").unlink() if text is None else (single / "config.json").write_text(text)
    found = refusal(single)
    assert str(single / "config.json") in found
    assert words in found


def header(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
CORPUS = {
    "empty": (b"", "only 0 bytes"),
    "header length 0": (bytes(8), "not a whole safetensors file"),
    "header length 2^40": ((2**40).to_bytes(8, "little") + b"{}", "header is longer than the file"),
    "not JSON": (header(b"{{{{{{{"), "invalid JSON"),
    "HTML": (b"<!DOCTYPE html><html>404</html>", "HTML page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "zip pickle": (b"PK\x03\x04" + bytes(100), "pickle"),
    "pickle": (b"\x80\x04" + bytes(100), "pickle"),
    "duplicate name": (
        header(b'{"a":%b,"a":%b}' % ((json.dumps(ONE).encode(),) * 2)) + bytes(4),
        "key 'a' occurs twice",
    ),
    "gap": (header({"a": {**ONE, "data_offsets": [4, 8]}}) + bytes(8), "not a whole safetensors file"),
    "trailing bytes": (header({"a": ONE}) + bytes(9), "not a whole safetensors file"),
    "wrong size": (header({"a": {**ONE, "shape": [3]}}) + bytes(4), "not a whole safetensors file"),
    "fp8": (header({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}) + bytes(4), "'a' is F8_E4M3"),
    "int8": (header({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}) + bytes(4), "'a' is I8"),
    "no tensors": (header({}), "holds no tensor"),
}


@pytest.mark.parametrize("case", CORPUS)
def test_broken_weight_file(case, single):
    content, words = CORPUS[case]
    (single / "model.safetensors").write_bytes(content)
    found = refusal(single)
    assert str(single) in found
    assert words in found


@pytest.mark.parametrize("cut", [1, 100, 5000, -20])
def test_truncated_shard_is_named(sharded, cut):
    path = sharded / SHARD
    path.write_bytes(path.read_bytes()[:-cut])
    assert f"{path}: not a whole safetensors file" in refusal(sharded)


def test_pickle_and_nothing(single):
    (single / "model.safetensors").unlink()
    assert "found none" in refusal(single)
    (single / "pytorch_model.bin").touch()
    assert "pytorch_model.bin, a pickle" in refusal(single)


def test_single_file_and_index(single, sharded):
    shutil.copy(single / "model.safetensors", sharded)
    assert "remove one" in refusal(sharded)


def test_index_faults_are_told_at_once(sharded):
    def change(content):
        names = sorted(content["weight_map"])
        wrong = [
            "../evil.safetensors",
            "/abs.safetensors",
            "a\\b.safetensors",
            "gone.safetensors",
            "nul\0.safetensors",
            "..",
        ]
        content["weight_map"].update(zip(names, wrong, strict=False))

    edit(sharded / INDEX, change)
    found = refusal(sharded)
    assert str(sharded / INDEX) in found
    for file in ("'../evil.safetensors'", "'/abs.safetensors'", "'..'"):
        assert f"{file} is not a plain file name" in found
    assert found.count("is not a plain file name") == 5
    assert "shard 'gone.safetensors' does not exist" in found


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "<html>"])
def test_index_without_a_map(sharded, text):
    (sharded / INDEX).write_text(text)
    assert INDEX in refusal(sharded)


def test_tensor_in_the_wrong_shard_in_none_and_in_two(sharded):
    def wrong(content):
        content["weight_map"][Q] = next(f for f in content["weight_map"].values() if f != content["weight_map"][Q])

    original = (sharded / INDEX).read_text()
    edit(sharded / INDEX, wrong)
    assert f"'{Q}' is" in refusal(sharded)
    (sharded / INDEX).write_text(original)
    edit(sharded / INDEX, lambda content: content["weight_map"].pop(Q))
    assert f"'{Q}' is not in the index" in refusal(sharded)
    (sharded / INDEX).write_text(original)
    shard = next(path for path in sharded.glob("*.safetensors") if Q not in load_file(path))
    save_file({**load_file(shard), Q: torch.ones(16, 16)}, shard)
    assert f"'{Q}' is not in the index" in refusal(sharded)


def test_family_lists_every_mismatch(tensors, save):
    weights = tensors(0)
    base = open_checkpoint(save("base", weights))
    lacking = {name: tensor for name, tensor in weights.items() if "norm" not in name}
    other = {**weights, Q: weights[Q].T[:8].contiguous(), "lm_head.weight": torch.ones(32, 16)}
    experts = {
        "math": open_checkpoint(save("math", lacking)),
        "code": open_checkpoint(save("code", other, hidden_size=8, tie_word_embeddings=False)),
        "fine": open_checkpoint(save("fine", weights)),
    }
    with pytest.raises(CheckpointError) as caught:
        check_family(base, experts)
    found = str(caught.value)
    assert "\n" not in found
    for name in weights:
        assert (f"tensor '{name}' is missing" in found) == ("norm" in name)
    assert f"expert 'code' ({experts['code'].path}): config hidden_size=8, base has 16" in found
    assert "config tie_word_embeddings=False, base has True" in found
    assert "tensor 'lm_head.weight' is not in the base" in found
    assert f"tensor '{Q}' has shape [8, 16], base has [16, 16]" in found
    assert "'fine'" not in found
    check_family(base, {"fine": experts["fine"]})


def test_permuted_tokenizer_of_the_same_size(tensors, save):
    base, expert = (save(name, tensors(0)) for name in ("base", "expert"))

    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit(expert / "tokenizer.json", swap)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json gives another id to 2 tokens, first 'a'"):
        check_family(open_checkpoint(base), {"expert": open_checkpoint(expert)})


def test_added_and_unigram_tokens(tensors, save):
    base, expert = (save(name, tensors(0)) for name in ("base", "expert"))
    for folder in (base, expert):
        edit(folder / "tokenizer.json", lambda c: c.update(model={"vocab": [["a", -1.0], ["b", -2.0]]}))
    check_family(open_checkpoint(base), {"expert": open_checkpoint(expert)})
    edit(expert / "tokenizer.json", lambda c: c.update(added_tokens=[{"content": "<think>", "id": 2}]))
    with pytest.raises(CheckpointError, match="first '<think>'"):
        check_family(open_checkpoint(base), {"expert": open_checkpoint(expert)})


def test_file_removed_while_open(single):
    checkpoint = open_checkpoint(single)
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"tensor '{Q}' can't be read"):
        checkpoint.read(Q)
