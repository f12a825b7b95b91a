"""Very tall matrices, merged in a basis of what their columns span, against the same method on the whole matrix."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rotrl.checkpoint.layout import Role
from rotrl.errors import ConfigError, NumericsError
from rotrl.merge import chunks, span
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge_state
from rotrl.merge.signature import function_of, kind_of

EMBEDDING = "model.embed_tokens.weight"
SIDES = (
    "split_task_arithmetic",
    "orthomerge",
    "lie_sum",
    "sequential",
    "lie_mean",
    "karcher_rotation",
    "chordal",
    "geodesic",
)
EQUIVARIANT = (
    "tsv_m",
    "iso_c",
    "iso_cts",
    "knots_ties",
    "rewiring",
    "resmerge",
    *SIDES,
    "iso_merger",
    "svc",
    "subspace_boosting",
    "spectrum_projection",
)
FULL_RANK = ("tsv_m", "iso_c", "iso_cts", "rewiring", "subspace_boosting")  # fill null spaces arbitrarily


def tall(kind, rows=150, columns=5, size=1e-3):
    """A base and two experts, float64 of numbers that float32 holds."""
    generator = torch.Generator().manual_seed(0)
    base, *updates = torch.randn(3, rows, columns, generator=generator)
    if kind == "ill-conditioned":
        base = base @ torch.linalg.svd(torch.randn(columns, columns, generator=generator))[0] * torch.logspace(0, -3, 5)
    if kind == "few rows changed":
        updates = [update * (torch.arange(rows) < 3)[:, None] for update in updates]
    if kind == "equal experts":
        updates = [updates[0]] * 2
    if kind == "a column of zeros":
        base, updates = (base * (torch.arange(columns) > 0), [u * (torch.arange(columns) > 0) for u in updates])
    base = 0.03 * base
    return base.double(), [(base + 0.03 * size * update).double() for update in updates]


def compared(bound, base, experts, dtype):
    """|merge in pieces - merge of the whole in float64| over the update."""
    role, rows = Role(None, "embedding"), 7
    below = bound.of("w", role, base, experts) if bound.of else None
    whole = bound("w", role, base, experts, merged=below)
    merged = None if below is None else below.to(dtype).split(rows)
    parts = bound.merge("w", role, cut(base.to(dtype), [w.to(dtype) for w in experts], rows), merged=merged)
    return float((torch.cat([part for _, _, part in parts]) - whole).norm() / (whole - base).norm())


def cut(base, experts, rows):
    return list(zip(base.split(rows), zip(*(w.split(rows) for w in experts), strict=True), strict=True))


@pytest.mark.parametrize(
    "kind", ["random", "ill-conditioned", "few rows changed", "equal experts", "a column of zeros"]
)
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_a_tall_matrix_is_merged_as_the_whole(name, kind, method):
    if name in FULL_RANK and kind != "random":
        kind = "ill-conditioned"
    base, experts = tall(kind)
    for side in ("right", "left") if name in SIDES else ("",):
        bound = method(name, scope="all", **({"side": side} if side else {}))
        assert bound.kind == "equivariant"
        assert compared(bound, base, experts, torch.float64) < 1e-6
        assert compared(bound, base, experts, torch.float32) < 1e-3


def test_every_equivariant_method_is_tested():
    presets = {p.stem: OmegaConf.load(p) for p in (Path(__file__).parents[2] / "conf" / "merge").glob("*.yaml")}
    targets = {name: str(preset["_target_"]) for name, preset in presets.items() if "_target_" in preset}
    assert {n for n, target in targets.items() if kind_of(function_of(target)) == "equivariant"} == {*EQUIVARIANT}


@pytest.mark.parametrize("scale", [1.0, "norm", "retention"])
@pytest.mark.parametrize("name", [*EQUIVARIANT, "coram"])
def test_the_engine_merges_an_embedding_by_rows(name, scale, trio, method, shipped, monkeypatch):
    changes = {"scope": "all"} | ({"scale": scale} if "scale" in shipped(name) else {})
    expected = merge_state(*trio, method(name, **changes))[EMBEDDING]
    monkeypatch.setattr("rotrl.merge.method.TALL", 2)
    monkeypatch.setattr(chunks, "ENTRIES", 8 * expected.shape[1])
    bound = method(name, **changes)
    assert bound.rows(EMBEDDING, Role(None, "embedding"), expected.shape) is not None
    merged = merge_state(*trio, bound)[EMBEDDING]
    base = trio[0].read(EMBEDDING)
    assert (merged - expected).norm() < 1e-4 * (expected - base).norm()


def test_what_lies_on_top_is_handed_the_pieces_of_the_merge_below(trio, method, shipped, monkeypatch):
    changes = {"of": shipped("coram", scope="all", height=6), "scope": "all"}
    expected = merge_state(*trio, method("svc", **changes))[EMBEDDING]
    monkeypatch.setattr("rotrl.merge.method.TALL", 2)
    monkeypatch.setattr(chunks, "ENTRIES", 8 * expected.shape[1])
    bound = method("svc", **changes)
    assert bound.rows(EMBEDDING, Role(None, "embedding"), expected.shape) == 6
    torch.testing.assert_close(merge_state(*trio, bound)[EMBEDDING], expected, atol=1e-5, rtol=0)


def test_methods_that_need_whole_matrices_refuse_embeddings(shipped):
    for name, changes, told in (
        ("wudi", {}, "wudi"),
        ("regmean", {}, "regmean"),
        ("orthomerge", {"residual": "ties"}, "merge.residual=ties"),
        ("orthomerge", {"variant": "conflict"}, "merge.variant=conflict"),
        ("orthomerge", {"per_layer": {"residual": {"embedding": "ties"}}}, "merge.residual=ties"),
    ):
        with pytest.raises(ConfigError, match=rf"merge\.scope=all: {told} takes matrices whole.*scope=matrices"):
            bind(shipped(name, scope="all", **changes), ["math", "code"])


def test_not_a_number(method):
    base, experts = tall("random")
    base[70, 2] = float("nan")
    with pytest.raises(NumericsError, match="NaN or Inf"):
        list(method("tsv_m", scope="all").merge("w", Role(None, "embedding"), cut(base, experts, 7)))


def test_blocks_of_rows_change_nothing(method, monkeypatch):
    base, experts = tall("random")
    for rows in (1, 40, 10**6):
        monkeypatch.setattr(span, "ROWS", rows)
        assert compared(method("tsv_m", scope="all"), base, experts, torch.float64) < 1e-9
