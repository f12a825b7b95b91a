"""What holds for every shipped method: the order of experts, scope, parameters by depth and by module."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rotrl.checkpoint.grams import GRAMS
from rotrl.checkpoint.layout import Role, role_of
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.rotations import Rotation, save_rotations
from rotrl.checkpoint.writer import write_json, write_weights
from rotrl.errors import ConfigError, NumericsError
from rotrl.linalg.rotation import exp
from rotrl.merge import chunks
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge, merge_state
from rotrl.merge.merger import Merger

METHODS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "conf" / "merge").glob("*.yaml")
    if "\n_target_:" in path.read_text()
)
# The order of experts has a meaning, or each expert has its own draw.
ORDERED = {"slerp", "interpolation", "geodesic", "geodesic_aligned", "sequential"}
WHOLE = {"wudi", "regmean"}  # merge no embeddings
DRAWN = {"dare_linear", "dare_ties", "della", "della_linear"}


@pytest.fixture
def of_stages(trio, tmp_path):
    """of_stages(method): the rotations of the first expert, or the Gram matrices, that stages leave for a method."""
    base, experts = trio

    def rotations(path):
        generator = torch.Generator().manual_seed(0)
        made = {}
        for name, info in base.tensors.items():
            if role_of(name, info.shape).is_matrix:
                skew = torch.randn(info.shape[1], info.shape[1], generator=generator, dtype=torch.float64)
                made[name] = Rotation(right=exp(0.1 * (skew - skew.T)))
        save_rotations(path, made, {"source": '{"expert": "math"}'})
        return path

    def grams(name):
        folder = tmp_path / f"grams-{name}"
        if not folder.exists():
            folder.mkdir()
            widths = {n: i.shape[1] for n, i in base.tensors.items() if role_of(n, i.shape).is_matrix}
            generator = torch.Generator().manual_seed(ord(name[0]))
            inputs = {width: torch.randn(40, width, generator=generator) for width in set(widths.values())}
            shapes = {n: (width, width) for n, width in widths.items()}
            sha256, _ = write_weights(
                folder, shapes, torch.float32, lambda n: inputs[widths[n]].T @ inputs[widths[n]] / 40
            )
            told = {"entries": {n: n for n in shapes}, "weights": experts[name].sha256, "tokens": 40, "sha256": sha256}
            write_json(folder / GRAMS, told)
        return folder

    def give(method):
        found = {"rotations": rotations(tmp_path / "r.safetensors")} if method.needs_rotations else {}
        return found | ({"grams": {name: grams(name) for name in experts}} if method.gram is not None else {})

    return give


@pytest.mark.parametrize("name", sorted({"learned", "geodesic_aligned", "regmean"}))
def test_what_reads_a_stage_streams_as_it_merges_in_memory(name, trio, method, of_stages, tmp_path, monkeypatch):
    from rotrl.checkpoint import writer

    chosen = method(name)
    given = of_stages(chosen)
    state = merge_state(*trio, chosen, **given)
    for size in (3000, 5 * 10**9):
        monkeypatch.setattr(writer, "SHARD_SIZE", size)
        merge(*trio, chosen, tmp_path / f"out{size}", **given)
        written = open_checkpoint(tmp_path / f"out{size}")
        for tensor, expected in state.items():
            assert torch.equal(written.read(tensor), expected), tensor


def test_learned_begins_at_the_very_start_that_was_aligned(trio, shipped, method, tmp_path, monkeypatch):
    """Also where the start draws by pieces; what has no rotation is not held whole."""
    monkeypatch.setattr(chunks, "ENTRIES", 100)
    start, name = shipped("dare_ties"), "model.layers.0.self_attn.q_proj.weight"
    skew = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = Rotation(right=exp(0.1 * (skew - skew.T)).float())
    save_rotations(tmp_path / "r.safetensors", {name: turned}, {"source": json.dumps({"merge": start})})
    aligned = merge_state(*trio, bind(start, ["math", "code"]))
    for scope in ("all", "matrices"):
        merger = Merger(*trio, method("learned", scope=scope), tmp_path / "r.safetensors")
        for tensor, expected in aligned.items():
            merged = torch.cat([part for _, _, part in merger.parts(tensor)])
            if tensor == name:
                assert merger.rows(tensor) is None
                torch.testing.assert_close(merged, turned.apply(expected))
            elif scope == "all" or role_of(tensor, expected.shape).is_matrix:
                assert expected.ndim < 2 or merger.rows(tensor) is not None
                assert torch.equal(merged, expected)


@pytest.mark.parametrize("name", sorted({*METHODS} - ORDERED - DRAWN))
def test_the_order_of_experts_changes_nothing(name, trio, shipped, of_stages):
    base, experts = trio
    turned = dict(reversed(experts.items()))
    there, back = (bind(shipped(name), list(given)) for given in (experts, turned))
    given = of_stages(there)
    one, other = merge_state(base, experts, there, **given), merge_state(base, turned, back, **given)
    for tensor, expected in one.items():
        torch.testing.assert_close(other[tensor], expected, rtol=1e-4, atol=1e-4, msg=lambda m, t=tensor: f"{t}: {m}")


TOGETHER = sorted(
    {*METHODS}
    - ORDERED
    - DRAWN
    - {"learned", "regmean", "svc", "spectrum_projection", "subspace_boosting", "wudi", "nuslerp"}
)


@pytest.mark.parametrize("name", TOGETHER)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(3)))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_three(name, models, shipped, seed, order):
    first, others = models(seed, (6, 8), size=0.05)
    base, *experts = (torch.tensor(weights).float() for weights in (first, *others))
    method = bind(shipped(name), ["a", "b", "c"])
    merged = []
    for places in (range(3), order):
        chosen = [experts[place] for place in places]
        statistics = method.statistics()
        if statistics is not None:
            statistics.add([(base, chosen)])
        try:
            merged.append(method("w", Role(0, "q"), base, chosen, statistics=statistics))
        except NumericsError:  # a reflection, in any order
            assume(False)
    torch.testing.assert_close(*merged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_scope_matrices_leaves_the_rest_to_the_linear_rule(name, trio, method, of_stages):
    base, experts = trio
    states = {}
    for scope in ("all", "matrices"):
        if scope == "all" and name in WHOLE:
            continue
        chosen = method(name, scope=scope)
        states[scope] = merge_state(*trio, chosen, **of_stages(chosen))
        assert all(tensor.isfinite().all() for tensor in states[scope].values())
    rule = chosen
    while rule.of is not None:
        rule = rule.of
    t = rule.hyper.get("t") if rule.merges_a_pair else None
    scale = rule.hyper.get("scale", 1.0) / (2 if rule.averages(rule.hyper) or "scale" not in rule.hyper else 1)
    for tensor, merged in states["matrices"].items():
        if role_of(tensor, merged.shape).is_matrix:
            if "all" in states:
                torch.testing.assert_close(merged, states["all"][tensor])
            continue
        w0, (a, b) = base.read(tensor), [expert.read(tensor) for expert in experts.values()]
        expected = w0 + scale * (a + b - 2 * w0) if t is None else a + t * (b - a)
        if chosen.of is None:
            torch.testing.assert_close(merged, expected, msg=lambda m, t=tensor: f"{t}: {m}")
    with pytest.raises(ConfigError, match=r"merge\.scope is 'matrixes', one of matrices, all"):
        method(name, scope="matrixes")


AVERAGING = ("ties", "della", "knots_ties", "nuslerp", "multislerp", "lie_mean", "karcher_rotation", "chordal")


@pytest.mark.parametrize("name", AVERAGING)
def test_equal_experts_give_that_expert_in_every_tensor_of_a_mean(name, trio, method):
    base, (expert, _) = trio[0], trio[1].values()
    density = {"density": 1.0} if "density" in method(name).hyper else {}
    merged = merge_state(base, {"math": expert, "code": expert}, method(name, scope="matrices", **density))
    for tensor, found in merged.items():
        torch.testing.assert_close(found, expert.read(tensor), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", AVERAGING)
def test_the_rest_of_a_mean_has_the_same_scale(name, trio, method):
    """Of equal experts a mean is their update, and its scale 1 / T as a rule and as a number are one."""
    base, (expert, _) = trio[0], trio[1].values()
    two = {"math": expert, "code": expert}
    merged = [merge_state(base, two, method(name, scope="matrices", scale=scale)) for scale in ("mean", 0.5)]
    for tensor in base.tensors:
        torch.testing.assert_close(merged[0][tensor], merged[1][tensor])
        if not role_of(tensor, base.tensors[tensor].shape).is_matrix:
            torch.testing.assert_close(merged[0][tensor], (base.read(tensor) + expert.read(tensor)) / 2)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_that_are_left_out_have_their_defaults(name, trio, method, shipped, of_stages):
    needed = {key: value for key, value in shipped(name).items() if key in ("_target_", "of", "scope", "gram")}
    plain, bare = method(name), bind(needed, ["math", "code"])
    assert (bare.hyper, bare.scale, bare.passes) == (plain.hyper, plain.scale, plain.passes)
    state, expected = (merge_state(*trio, each, **of_stages(each)) for each in (bare, plain))
    assert all(torch.equal(state[tensor], expected[tensor]) for tensor in expected)


@pytest.mark.parametrize("name", METHODS)
def test_float64_gives_the_digits_that_float32_lacks(name, trio, method, of_stages):
    plain, exact = method(name), method(name, precision="float64")
    rough, found = (merge_state(*trio, chosen, **of_stages(chosen)) for chosen in (plain, exact))
    for tensor, merged in found.items():
        assert merged.dtype == torch.float64
        torch.testing.assert_close(
            rough[tensor].double(), merged, rtol=1e-4, atol=1e-4, msg=lambda m, t=tensor: f"{t}: {m}"
        )
    with pytest.raises(ConfigError, match=r"merge\.precision is 'double', one of float32, float64"):
        method(name, precision="double")


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_that_is_the_same_everywhere_is_the_parameter(name, trio, method, of_stages):
    plain = method(name)
    numbers = {key: value for key, value in plain.hyper.items() if isinstance(value, float)}
    if plain.statistics():
        numbers.pop("threshold")  # of the whole model
    given = of_stages(plain)
    expected = merge_state(*trio, plain, **given)
    by_depth = {key: [value, value] for key, value in numbers.items()}
    by_module = {key: {"q": value, r"mlp\.up": value} for key, value in numbers.items()}
    for per_layer in (by_depth, by_module):
        state = merge_state(*trio, method(name, per_layer=per_layer), **given)
        for tensor in expected:
            torch.testing.assert_close(state[tensor], expected[tensor])
    for wrong, words in (({"dpeth": [1.0]}, r"per_layer\.dpeth"), ([1.0], r"merge\.per_layer is")):
        with pytest.raises(ConfigError, match=words):
            method(name, per_layer=wrong)
    if numbers:
        with pytest.raises(ConfigError, match=r"'qq' is neither a module"):
            merge_state(*trio, method(name, per_layer={key: {"qq": value} for key, value in numbers.items()}), **given)
