"""Merging in pieces of rows: the same for any sharding, and what the whole tensor at once would give."""

from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotrl.checkpoint import writer
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.errors import NumericsError
from rotrl.merge import chunks, summary
from rotrl.merge.chunks import Chunks, rows_of
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.summary import Gram, Thresholds

SPHERICAL = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
SUMMARISED = (*SPHERICAL, "ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ram_plus", "arcee_fusion")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
ROWS = ("linear", "task_arithmetic", "extrapolation", "interpolation", "consensus", "magmax", *SUMMARISED, *RANDOM)


@pytest.mark.parametrize("name", ROWS)
@given(entries=st.integers(1, 600), shard=st.integers(1, 20_000))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streamed_equals_in_memory_for_any_shard_and_piece(name, entries, shard, trio, method):
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(chunks, "ENTRIES", entries)
        patch.setattr(writer, "SHARD_SIZE", shard)
        merge(*trio, method(name), f"{folder}/out", dtype="float32")
        merged, state = open_checkpoint(f"{folder}/out"), merge_state(*trio, method(name))
        assert all(torch.equal(merged.read(tensor), expected) for tensor, expected in state.items())


@pytest.mark.parametrize("scale", [0.5, "mean", "norm", "retention"])
@pytest.mark.parametrize("name", [name for name in ROWS if name not in RANDOM])
def test_pieces_give_what_the_whole_tensor_gives(name, scale, trio, method, shipped, monkeypatch):
    changes = {"scale": scale} if "scale" in shipped(name) else {}
    whole = merge_state(*trio, method(name, **changes))
    monkeypatch.setattr(chunks, "ENTRIES", 37)
    for tensor, merged in merge_state(*trio, method(name, **changes)).items():
        torch.testing.assert_close(merged, whole[tensor], atol=2e-6, rtol=0)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_axes_of_nuslerp_in_pieces(axis, trio, method, monkeypatch):
    whole = merge_state(*trio, method("nuslerp", axis=axis))
    monkeypatch.setattr(chunks, "ENTRIES", 37)
    for tensor, merged in merge_state(*trio, method("nuslerp", axis=axis)).items():
        torch.testing.assert_close(merged, whole[tensor], atol=2e-6, rtol=0)


def test_pieces_draw_masks_of_their_own(trio, method, monkeypatch):
    name = "model.embed_tokens.weight"
    monkeypatch.setattr(chunks, "ENTRIES", 64)
    base, merged = trio[0].read(name), merge_state(*trio, method("dare_ties"))[name]
    kept = (merged != base).unflatten(0, (-1, 64 // base.shape[1]))
    assert not (kept == kept[:1]).all()


@given(seed=st.integers(0, 10**6), density=st.floats(0.01, 1), rows=st.integers(1, 9), kind=st.integers(0, 2))
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_exact(dtype, sampled, seed, density, rows, kind):
    """Also where many entries are equal, and where the sample misleads because it takes the smallest entries."""
    generator = torch.Generator().manual_seed(seed)
    d = 1e-3 * torch.randn(9, 7, generator=generator, dtype=dtype)
    if kind == 1:
        d = (1e3 * d).round() / 1e3
    if kind == 2:
        d[:, ::5] *= 1e-3
    pieces = [(torch.zeros_like(part), [part, 2 * part]) for part in d.split(rows)]
    expected = d.abs().flatten().sort(descending=True).values[max(1, round(density * d.numel())) - 1].item()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "SAMPLED", 0 if sampled else 100)
        patch.setattr(summary, "STRIDE", 5)
        patch.setattr(summary, "SIGMAS", 0.1)
        thresholds = Thresholds.of(pieces, {"density": density})
    assert thresholds is not None
    assert thresholds.least == [expected, 2 * expected]
    assert Thresholds.of(pieces, {"threshold": "model"}) is None


def test_gram_of_pieces_is_that_of_the_whole():
    w0, *ws = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    flat = torch.stack([w0, *(w - w0 for w in ws)]).double().flatten(1)
    gram = Gram.of([(w0[i : i + 5], [w[i : i + 5] for w in ws]) for i in range(0, 12, 5)], {})
    assert gram is not None
    torch.testing.assert_close(gram.inner, flat @ flat.mT)


def test_shapes_and_faults():
    for shape in ((), (5,), (0, 3), (700, 2000), (3, 900, 900)):
        pieces = Chunks(torch.ones(shape), [torch.zeros(shape)], rows=rows_of(shape) if len(shape) > 1 else None)
        assert torch.equal(torch.cat([base.reshape(-1) for base, _ in pieces]), torch.ones(shape).reshape(-1))
        assert len(list(pieces)) == len(pieces)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        Chunks(torch.tensor([1.0, torch.inf]), [torch.zeros(2)], rows=None)[0]


@given(
    values=st.lists(st.floats(width=32), max_size=9),
    others=st.floats(width=32, allow_nan=False),
    count=st.integers(1, 4),
)
def test_finite_is_isfinite_of_every_value(values, others, count):
    numbers = torch.tensor(values)
    for place in range(count):
        tensors = [torch.full((len(values),), others) for _ in range(count)]
        tensors[place] = numbers
        assert chunks.finite(*tensors) == all(bool(tensor.isfinite().all()) for tensor in tensors)
