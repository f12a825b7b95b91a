"""The engine: streamed equals in memory, reuse, refusal, dtypes, and nothing left after an error."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from rotrl.checkpoint import writer
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.rotations import Rotation, save_rotations
from rotrl.checkpoint.verify import verify
from rotrl.errors import CheckpointError, ConfigError, NumericsError
from rotrl.linalg.rotation import exp
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.plan import plan_merge

METHODS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "conf" / "merge").glob("*.yaml")
    if "\n_target_:" in path.read_text() and path.stem not in ("learned", "geodesic_aligned", "regmean")
)
Q = "model.layers.0.self_attn.q_proj.weight"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def reopen(trio):
    """The same folders, read anew: checkpoints remember their hashes."""
    base, experts = trio
    return open_checkpoint(base.path), {name: open_checkpoint(expert.path) for name, expert in experts.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shard_size", [3000, 5 * 10**9])
def test_streamed_equals_in_memory_for_any_shard_size(name, shard_size, trio, method, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_SIZE", shard_size)
    result = merge(*trio, method(name), tmp_path / "out")
    state = merge_state(*trio, method(name))
    merged = open_checkpoint(tmp_path / "out")
    assert list(merged.tensors) == sorted(state)
    for tensor, expected in state.items():
        assert torch.equal(merged.read(tensor), expected), tensor
    assert result["sha256"] == merged.sha256
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_size == 3000)
    verify(tmp_path / "out")


def test_the_commit_of_a_hub_model_is_published_and_its_plain_id_is_the_base_model(trio, method, tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--org--base" / "snapshots" / commit
    shutil.copytree(trio[0].path, snapshot)
    merge(open_checkpoint(snapshot), trio[1], method("linear"), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/base", "math", "code"]
    names = [f"org/base@{commit}", "math", "code"]
    assert yaml.safe_load((tmp_path / "out" / "rotrl_config.yaml").read_text())["names"] == names
    assert yaml.safe_load(card.text.partition("```yaml")[2].partition("```")[0])["names"] == names
    assert verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "changes"), [("dare_ties", {}), ("ties", {"threshold": "model"}), ("ram_plus", {}), ("tsv_m", {})]
)
def test_sharding_of_inputs_and_output_changes_no_number(name, changes, tensors, save, method, tmp_path, monkeypatch):
    base = tensors(0)
    experts = {"math": tensors(1, base=base), "code": tensors(2, base=base)}
    results = []
    for shards in (1, 3):
        monkeypatch.setattr(writer, "SHARD_SIZE", 10**9 if shards == 1 else 2000)
        folders = [
            save(f"{model}{shards}", weights, shards=shards) for model, weights in [("base", base), *experts.items()]
        ]
        models = [open_checkpoint(folder) for folder in folders]
        pair = dict(zip(experts, models[1:], strict=True))
        results.append(merge(models[0], pair, method(name, **changes), tmp_path / f"out{shards}"))
    assert results[0]["sha256"] == results[1]["sha256"]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]


def test_result_and_folder(trio, method, tmp_path):
    steps = []
    result = merge(
        *trio, method("task_arithmetic", scale=0.5), tmp_path / "a" / "out", progress=lambda *at: steps.append(at)
    )
    assert steps == [(i + 1, 20) for i in range(20)]
    assert result["effective_coefficient"] == pytest.approx(0.5, abs=1e-5)
    assert result["coefficients"] == pytest.approx({"math": 0.5, "code": 0.5}, abs=1e-4)
    assert (result["dtype"], result["storage_loss"], result["warnings"]) == ("float32", 0, [])
    folder = tmp_path / "a" / "out"
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "rotrl_config.yaml",
        "rotrl_manifest.json",
    }
    assert [file.name for file in folder.parent.iterdir()] == ["out"]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert str(tmp_path) not in "".join((folder / name).read_text() for name in ("README.md", "rotrl_config.yaml"))
    assert json.loads((folder / "rotrl_manifest.json").read_text())["fingerprint"] == result["fingerprint"]


def test_transformers_loads_the_merge(tmp_path, method):
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    models = {}
    for name in ("base", "math", "code"):
        transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
        models[name] = open_checkpoint(tmp_path / name)
    state = merge_state(models.pop("base"), models, method("task_arithmetic"))
    base = open_checkpoint(tmp_path / "base")
    merge(base, models, method("task_arithmetic"), tmp_path / "out")
    loaded, told = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for name, expected in state.items():
        assert torch.equal(loaded.state_dict()[name], expected)


def test_equal_merge_is_reused_and_nothing_is_written(trio, method, tmp_path):
    first = merge(*trio, method("ties"), tmp_path / "out")
    before = contents(tmp_path / "out")
    again = merge(*reopen(trio), method("ties"), tmp_path / "out", overwrite=True)
    assert (first["reused"], again["reused"]) == (False, True)
    assert {**first, "reused": 0, "seconds": 0} == {**again, "reused": 0, "seconds": 0}
    assert contents(tmp_path / "out") == before


def test_other_merge_is_refused_naming_what_differs_then_replaced_on_request(trio, method, tmp_path):
    target = tmp_path / "out"
    merge(*trio, method("ties"), target)
    before = contents(target)
    with pytest.raises(ConfigError, match=r"another merge \(other merge\.density\); use overwrite=true"):
        merge(*trio, method("ties", density=0.5), target)
    assert contents(target) == before
    assert not merge(*trio, method("ties", density=0.5), target, overwrite=True)["reused"]
    assert contents(target) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "code", "math", "out"]


def test_incomplete_merge_is_neither_reused_nor_overwritten_unasked(trio, method, tmp_path):
    target = tmp_path / "out"
    merge(*trio, method("linear"), target)
    (target / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="absent or changed files"):
        merge(*trio, method("linear"), target)
    assert not merge(*trio, method("linear"), target, overwrite=True)["reused"]
    verify(target)


def test_models_and_foreign_folders_are_never_overwritten(trio, method, tmp_path):
    base, experts = trio
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    for target, words in ((experts["math"].path, "the model"), (tmp_path, "the model"), (foreign, "did not write")):
        with pytest.raises(ConfigError, match=words):
            merge(base, experts, method("linear"), target, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "years"


def test_empty_folder_is_a_target(trio, method, tmp_path):
    (tmp_path / "out").mkdir()
    merge(*trio, method("linear"), tmp_path / "out")
    verify(tmp_path / "out")


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), NumericsError("bad"), Interrupt()])
@pytest.mark.parametrize("at", [1, 20])
def test_nothing_remains_after_an_error(fault, at, trio, method, tmp_path):
    before = {name: contents(tmp_path / name) for name in ("base", "math", "code")}

    def progress(done, total):
        if done == at:
            raise fault

    expected = CheckpointError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected):
        merge(*trio, method("linear"), tmp_path / "out", progress=progress)
    assert {path.name: contents(path) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", [Path.unlink, lambda file: save_file(load_file(file), file)])
def test_models_that_change_after_the_last_tensor_are_told(change, trio, method, tmp_path):
    files = [tmp_path / name / "model.safetensors" for name in ("base", "code")]

    def progress(done, total):
        for file in files if done == total else ():
            change(file)

    told = "; ".join(f"{file}: the file changed while it was used; run again" for file in files)
    with pytest.raises(CheckpointError, match=re.escape(told)):
        merge(*trio, method("linear"), tmp_path / "out", progress=progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "code", "math"]


def test_error_while_overwriting_keeps_the_old(trio, method, tmp_path):
    merge(*trio, method("linear"), tmp_path / "out")
    before = contents(tmp_path / "out")

    def progress(done, total):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        merge(*trio, method("ties"), tmp_path / "out", overwrite=True, progress=progress)
    assert contents(tmp_path / "out") == before


def _merge_and_die(paths, config, target):
    from rotrl.merge.bind import bind

    base, experts = open_checkpoint(paths[0]), {p.name: open_checkpoint(p) for p in paths[1:]}

    def progress(done, total):
        if done == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    merge(base, experts, bind(config, list(experts)), target, progress=progress)


def test_killed_merge_leaves_no_target_and_the_next_one_cleans_up(trio, shipped, method, tmp_path):
    base, experts = trio
    paths = [base.path, *(expert.path for expert in experts.values())]
    process = multiprocessing.get_context("spawn").Process(
        target=_merge_and_die, args=(paths, shipped("linear"), tmp_path / "out")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.partial"))
    merge(*trio, method("linear"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "code", "math", "out"]


def test_faster_process_wins_and_equal_work_is_reused(trio, method, tmp_path):
    def progress(done, total):
        if done == total:
            merge(*reopen(trio), method("linear"), tmp_path / "elsewhere")
            (tmp_path / "elsewhere").rename(tmp_path / "out")

    assert merge(*trio, method("linear"), tmp_path / "out", progress=progress)["reused"]
    with pytest.raises(ConfigError, match="another merge"):
        merge(*trio, method("ties"), tmp_path / "out")


@pytest.fixture
def halves(tensors, save):
    """A bfloat16 trio whose update is `size` of the norm."""

    def make(size):
        base = {name: tensor.bfloat16().float() for name, tensor in tensors(0).items()}
        models = [tensors(seed, base=base, size=size) for seed in (1, 2)]
        folders = [save(f"{i}-{size}", weights, dtype=torch.bfloat16) for i, weights in enumerate([base, *models])]
        checkpoints = [open_checkpoint(folder) for folder in folders]
        return checkpoints[0], {"math": checkpoints[1], "code": checkpoints[2]}

    return make


def test_auto_dtype_keeps_small_updates_in_float32(halves, method, tmp_path):
    result = merge(*halves(1e-2), method("linear"), tmp_path / "out")
    assert result["dtype"] == "float32"
    assert result["storage_loss"] == 0
    assert "would lose" in result["warnings"][0]
    assert open_checkpoint(tmp_path / "out").config["dtype"] == "float32"


def test_auto_dtype_is_the_bases_where_the_update_survives(halves, method, tmp_path):
    result = merge(*halves(3.0), method("linear"), tmp_path / "out")
    assert result["dtype"] == "bfloat16"
    assert 0 < result["storage_loss"] < 0.01
    assert {info.dtype for info in open_checkpoint(tmp_path / "out").tensors.values()} == {torch.bfloat16}
    assert open_checkpoint(tmp_path / "out").config["dtype"] == "bfloat16"


def test_auto_dtype_decides_by_the_whole_model_not_by_the_probes(halves, method, tmp_path, monkeypatch):
    from rotrl.merge.stream import Stream

    monkeypatch.setattr(Stream, "loss", lambda *_: 0.0)
    result = merge(*halves(1e-2), method("linear"), tmp_path / "out")
    assert (result["dtype"], result["storage_loss"]) == ("float32", 0)
    verify(tmp_path / "out")


def test_chosen_dtype_is_kept_and_its_loss_is_told(halves, method, tmp_path):
    models = halves(1e-3)
    result = merge(*models, method("linear"), tmp_path / "out", dtype="bfloat16")
    state = merge_state(*models, method("linear"))
    base = {name: models[0].read(name).float() for name in state}
    lost = sum((w.bfloat16().float() - w).square().sum() for w in state.values())
    update = sum((state[name] - base[name]).square().sum() for name in state)
    assert result["storage_loss"] == pytest.approx(float((lost / update).sqrt()), rel=1e-3)
    assert any("dtype=float32 keeps it" in text for text in result["warnings"])


def test_unknown_dtype_and_overflow(trio, method, tmp_path):
    with pytest.raises(ConfigError, match="dtype is 'float8', one of auto, float32, bfloat16, float16"):
        merge(*trio, method("linear"), tmp_path / "out", dtype="float8")
    with pytest.raises(NumericsError, match="overflow float16"):
        merge(*trio, method("task_arithmetic", scale=1e6), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_numerics_error_names_the_tensor(trio, method, tmp_path):
    base, experts = trio
    weights = load_file(base.path / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, experts["code"].path / "model.safetensors")
    save_file(weights, experts["math"].path / "model.safetensors")
    base, experts = reopen(trio)
    with pytest.raises(NumericsError, match=r"merge=slerp: tensor 'model\.embed_tokens\.weight': .*opposite"):
        merge(base, experts, method("slerp"), tmp_path / "out")


@pytest.mark.parametrize("name", ["orthomerge", "tsv_m", "iso_merger", "coram", "resmerge", "svc"])
def test_decomposition_that_fails_names_the_tensor(name, trio, method, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise torch.linalg.LinAlgError("linalg: failed to converge")

    chosen = method(name, scope="matrices")
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(NumericsError, match=rf"^merge={name}: tensor 'model\.layers\.0\.\S+': .*failed"):
        merge(*trio, chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_a_number_is_named(trio, method, tmp_path):
    path = trio[1]["code"].path / "model.safetensors"
    weights = load_file(path)
    weights[Q][3, 3] = torch.nan
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=f"code/model.safetensors: tensor '{Q}' holds 1 NaN or Inf of 256"):
        merge(*reopen(trio), method("linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_another_shape_are_refused_before_a_byte(trio, tensors, save, method, tmp_path):
    weights = tensors(3)
    weights[Q] = weights[Q][:8]
    other = open_checkpoint(save("other", weights, hidden_size=8))
    with pytest.raises(CheckpointError, match=r"hidden_size=8, base has 16.*shape \[8, 16\], base has \[16, 16\]"):
        merge(trio[0], {"math": trio[1]["math"], "other": other}, method("linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_matrices_that_no_name_tells(tensors, save, method, tmp_path):
    weights = {f"block.{i}.w": tensor for i, tensor in enumerate(tensors(0).values())}
    models = [open_checkpoint(save(name, weights)) for name in ("base", "math", "code")]
    with pytest.raises(ConfigError, match=r"merge=tsv_m acts on the matrices.*merge\.scope=all"):
        merge(models[0], {"math": models[1], "code": models[2]}, method("tsv_m"), tmp_path / "out")


def test_expert_that_equals_the_base_is_told(trio, method, tmp_path):
    base, experts = trio
    result = merge(base, {"math": experts["math"], "code": base}, method("linear"), tmp_path / "out")
    assert result["warnings"] == ["expert code equals the base"]


def test_plan_from_headers(trio, method, halves):
    plan = plan_merge(*trio, method("orthomerge"))
    assert plan["tensors"]["q"] == 2
    assert plan["tensors"]["embedding"] == 1
    assert (plan["by_method"], plan["by_linear_rule"]) == (14, 6)
    assert plan["bytes"] == 4 * plan["parameters"]
    assert plan["warnings"] == []
    assert plan["rotations"]["right side, 16 columns"] == ["q", "o", "gate", "up"]
    assert plan_merge(*trio, method("linear"))["rotations"] == {}
    left = method("orthomerge", per_layer={"side": {"q": "left"}})
    assert plan_merge(*trio, left)["rotations"]["left side, 16 rows"] == ["q"]
    base, experts = halves(1e-2)
    assert plan_merge(base, experts, method("linear"), dtype="bfloat16")["bytes"] == 2 * plan["parameters"]
    mixed = plan_merge(trio[0], experts, method("linear"))
    assert "expert math is stored in bfloat16, the base in float32" in mixed["warnings"]


def write_rotations(path, trio, source, inputs=None, size=16):
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    r = Rotation(right=exp(0.05 * (a - a.mT)).float())
    base, experts = trio
    inputs = inputs or {"base": base.sha256, **{name: expert.sha256 for name, expert in experts.items()}}
    save_rotations(path, {Q: r}, {"source": json.dumps(source), "inputs": json.dumps(inputs)})
    return r.right


@pytest.mark.parametrize("source", ["base", "expert", "merge"])
def test_learned_merge_rotates_the_source_named_in_the_file(source, trio, shipped, method, tmp_path):
    base, experts = trio
    start = shipped("task_arithmetic", scale=0.5)
    named = {"base": {"model": "base"}, "expert": {"expert": "code"}, "merge": {"merge": start}}[source]
    r = write_rotations(tmp_path / "r.safetensors", trio, named)
    state = merge_state(base, experts, method("learned"), tmp_path / "r.safetensors")
    for name, merged in state.items():
        w0, *ws = (model.read(name) for model in (base, *experts.values()))
        w = {"base": w0, "expert": ws[1], "merge": w0 + 0.5 * (sum(ws) - 2 * w0)}[source]
        torch.testing.assert_close(merged, w @ r if name == Q else w)
    first = merge(base, experts, method("learned"), tmp_path / "out", rotations=tmp_path / "r.safetensors")
    assert first["sha256"] == open_checkpoint(tmp_path / "out").sha256


def test_geodesic_aligned_needs_rotations_of_the_first_expert(trio, method, tmp_path):
    path = tmp_path / "r.safetensors"
    write_rotations(path, trio, {"expert": "code"})
    with pytest.raises(ConfigError, match="source="):
        merge_state(*trio, method("geodesic_aligned"), path)
    write_rotations(path, trio, {"expert": "math"})
    state = merge_state(*trio, method("geodesic_aligned", t=1.0), path)
    for name, merged in state.items():
        torch.testing.assert_close(merged, trio[1]["code"].read(name))


def test_rotations_that_do_not_fit(trio, method, shipped, tmp_path):
    path, learned = tmp_path / "r.safetensors", method("learned")
    with pytest.raises(ConfigError, match="choose an align stage"):
        merge_state(*trio, learned)
    cases = [
        ({"model": "base"}, {"base": "0"}, 16, "made for other weights of base"),
        ({"model": "base"}, None, 15, "turns 15 dimensions, the tensor has 16"),
        ({"expert": "law"}, None, 16, "neither the base, nor one of the experts math, code"),
        ({"merge": shipped("learned")}, None, 16, "nor a merge without rotations"),
    ]
    for source, inputs, size, words in cases:
        write_rotations(path, trio, source, inputs, size)
        with pytest.raises(CheckpointError, match=words):
            merge_state(*trio, learned, path)


def test_other_rotations_are_another_merge(trio, method, tmp_path):
    path, target = tmp_path / "r.safetensors", tmp_path / "out"
    write_rotations(path, trio, {"model": "base"})
    merge(*trio, method("learned"), target, rotations=path)
    assert merge(*trio, method("learned"), target, rotations=path)["reused"]
    write_rotations(path, trio, {"expert": "math"})
    with pytest.raises(ConfigError, match="other rotations"):
        merge(*trio, method("learned"), target, rotations=path)
