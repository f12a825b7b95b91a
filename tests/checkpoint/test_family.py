"""Models that differ in vocabulary, head or tokenizer are made alike only on request, and then exactly as told."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.checkpoint.family import notes, open_family
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.rounding import cast
from rotrl.checkpoint.sidecar import copy_sidecars, sidecar_digest
from rotrl.checkpoint.writer import write_weights
from rotrl.errors import CheckpointError, ConfigError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def pair(tensors, save):
    """pair(base_rows, expert_rows, base_head, expert_head) are two folders with untied heads where asked."""

    def make(rows: tuple[int, int] = (32, 32), heads: tuple[bool, bool] = (False, False)):
        folders = []
        for seed, name in enumerate(("base", "expert")):
            weights = tensors(seed)
            weights[EMBEDDING] = torch.randn(rows[seed], 16, generator=torch.Generator().manual_seed(seed))
            if heads[seed]:
                weights[HEAD] = -weights[EMBEDDING]
            folders.append(save(name, weights, vocab_size=rows[seed], tie_word_embeddings=not heads[seed]))
        return folders

    return make


def opened(folders, **choices):
    base, experts = open_family(folders[0], {"expert": folders[1]}, **choices)
    return base, experts["expert"]


@pytest.mark.parametrize("rows", [(32, 36), (36, 32)])
@pytest.mark.parametrize("heads", [(False, False), (True, True)])
def test_padded_rows_are_no_update(rows, heads, pair):
    folders = pair(rows, heads)
    raw = [open_checkpoint(folder) for folder in folders]
    with pytest.raises(CheckpointError, match=r"vocab=pad or truncate"):
        opened(folders)
    models = opened(folders, vocab="pad")
    for name in [EMBEDDING, *([HEAD] if heads[0] else [])]:
        assert torch.equal(models[0].read(name)[32:], models[1].read(name)[32:])
        for model, stored in zip(models, raw, strict=True):
            assert model.tensors[name].shape == (36, 16)
            assert torch.equal(model.read(name)[: len(stored.read(name))], stored.read(name))
            assert model.config["vocab_size"] == 36


def test_truncated_rows(pair):
    folders = pair((36, 32))
    for model, stored in zip(opened(folders, vocab="truncate"), map(open_checkpoint, folders), strict=True):
        assert torch.equal(model.read(EMBEDDING), stored.read(EMBEDDING)[:32])
        assert model.config["vocab_size"] == 32


def test_truncation_never_cuts_a_token(pair):
    with pytest.raises(CheckpointError, match=r"base: .*keeps 20 rows and 6 tokens have ids beyond, first 'u'"):
        opened(pair((32, 20)), vocab="truncate")


@pytest.mark.parametrize("rows", [(36, 32), (32, 36)])
def test_truncation_asks_for_the_tokens_of_the_rows_that_it_cuts(rows, pair):
    folders = pair(rows)
    for folder in folders:
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    longer = max(zip(rows, folders, strict=True))[1]
    with pytest.raises(CheckpointError) as caught:
        opened(folders, vocab="truncate")
    told = "vocab=truncate keeps 32 rows and no tokenizer.json or vocab.json says which of the rest tokens use"
    remedy = "save the tokenizer as tokenizer.json, or use vocab=pad"
    assert str(caught.value) == f"{longer.name}: {longer}: {told}; {remedy}"
    opened(folders, vocab="pad")


@pytest.mark.parametrize("heads", [(True, False), (False, True)])
def test_untied_head_is_the_embedding_at_first(heads, pair, tmp_path):
    folders = pair((32, 36), heads)
    models = opened(folders, lm_head="untie", vocab="pad")
    for model, own in zip(models, heads, strict=True):
        sign = -1 if own else 1
        rows = 32 if model is models[0] else 36
        assert torch.equal(model.read(HEAD)[:rows], sign * model.read(EMBEDDING)[:rows])
        assert model.config["tie_word_embeddings"] is False
    shapes = {name: info.shape for name, info in models[0].tensors.items()}
    (tmp_path / "out").mkdir()
    sha256, _ = write_weights(tmp_path / "out", shapes, torch.float32, models[0].read)
    copy_sidecars(models[0], tmp_path / "out", torch.float32)
    assert open_checkpoint(tmp_path / "out").sha256 == sha256 == models[0].sha256


def test_only_heads_equal_to_the_embedding_are_tied(pair, tensors, save):
    folders = pair(heads=(False, True))
    with pytest.raises(CheckpointError, match=r"expert: .*'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        opened(folders, lm_head="tie")
    weights = tensors(3)
    copy = save("copy", {**weights, HEAD: weights[EMBEDDING].clone()}, vocab_size=32, tie_word_embeddings=False)
    for model in opened([folders[0], copy], lm_head="tie"):
        assert HEAD not in model.tensors
        assert model.config["tie_word_embeddings"] is True


def test_stored_copy_of_a_tied_embedding_is_dropped(tensors, save):
    weights = tensors(0)
    assert HEAD not in open_checkpoint(save("copy", {**weights, HEAD: weights[EMBEDDING].clone()})).tensors


def test_tokenizer_of_one_model(pair, tmp_path):
    folders = pair()
    content = json.loads((folders[1] / "tokenizer.json").read_text())
    content["added_tokens"].append({"content": "<think>", "id": 26})
    (folders[1] / "tokenizer.json").write_text(json.dumps(content))
    for choice, folder in (("base", folders[0]), ("expert", folders[1])):
        base, _ = opened(folders, tokenizer_from=choice)
        (tmp_path / choice / "out").mkdir(parents=True, exist_ok=True)
        copy_sidecars(base, tmp_path / choice / "out", torch.float32)
        written = tmp_path / choice / "out" / "tokenizer.json"
        assert written.read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert len({sidecar_digest(opened(folders, tokenizer_from=choice)[0]) for choice in ("base", "expert")}) == 2
    content["model"]["vocab"] |= {"a": 1, "b": 0}
    (folders[1] / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"gives another id to 2 tokens, first 'a' 1 \(base 0\)"):
        opened(folders, tokenizer_from="base")


def test_values_that_are_not_finite_are_read_on_request(tensors, save):
    weights = tensors(0)
    weights[EMBEDDING][0, 0] = torch.inf
    folders = save("base", tensors(0)), save("expert", weights)
    with pytest.raises(CheckpointError, match=r"1 NaN or Inf of 512 values"):
        opened(folders)[1].read(EMBEDDING)
    assert opened(folders, nonfinite="allow")[1].read(EMBEDDING).isinf().sum() == 1


@pytest.mark.parametrize(
    ("old", "new", "equal"),
    [
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, True),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
         {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}}, True),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5},
         {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}, True),
        ({"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, False),
        ({"rope_theta": 1e6}, {}, True),
    ],
)  # fmt: skip
def test_rope_settings_of_two_versions_of_transformers(old, new, equal, tensors, save):
    folders = save("base", tensors(0), **old), save("expert", tensors(1), **new)
    if equal:
        opened(folders)
    else:
        with pytest.raises(CheckpointError, match=r"config rope .*yarn.*, base has"):
            opened(folders)


@pytest.mark.parametrize("key", ["vocab", "lm_head", "nonfinite", "tokenizer_from"])
def test_unknown_choice(key, pair):
    with pytest.raises(ConfigError, match=f"{key} is 'x', one of "):
        opened(pair(), **{key: "x"})


def test_mixed_dtypes_are_told(tensors, save):
    weights = tensors(0)
    weights["model.norm.weight"] = weights["model.norm.weight"].double()
    mixed = open_checkpoint(save("mixed", tensors(0)))
    from safetensors.torch import save_file

    save_file(weights, mixed.path / "model.safetensors")
    told = notes(open_checkpoint(mixed.path), {"math": open_checkpoint(save("plain", tensors(0)))})
    assert told == [f"base mixes dtypes: {len(weights) - 1} in float32, 1 in float64"]


@given(
    value=st.floats(-1e4, 1e4, width=32),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    key=st.text(max_size=3),
)
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(value, dtype, key):
    count = 20_000
    exact = torch.full((count,), value)
    stored = cast(exact, dtype, "stochastic", key)
    nearest = exact[:1].to(dtype)
    below = torch.where(
        nearest.float() > value, torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype)), nearest
    )
    above = torch.where(below.float() == value, below, torch.nextafter(below, torch.tensor(torch.inf, dtype=dtype)))
    assert set(stored.tolist()) <= {below.item(), above.item()}
    step = above.item() - below.item()
    assert abs(stored.double().mean().item() - value) <= step * 5 * 0.5 / count**0.5
    assert torch.equal(stored, cast(exact, dtype, "stochastic", key))


def test_rounding_of_representable_and_wide_values():
    x = torch.randn(1000)
    assert torch.equal(cast(x.bfloat16().float(), torch.bfloat16, "stochastic", "a"), x.bfloat16())
    assert torch.equal(cast(x, torch.bfloat16, "nearest", "a"), x.bfloat16())
    assert torch.equal(cast(x, torch.float32, "stochastic", "a"), x)
    assert not torch.equal(cast(x, torch.bfloat16, "stochastic", "a"), cast(x, torch.bfloat16, "stochastic", "b"))
