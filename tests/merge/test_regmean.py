"""RegMean against least squares written out on the inputs themselves, in float64 numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import CheckpointError, ConfigError
from rotrl.merge.regmean import regmean

SEEDS = st.integers(0, 10**6)
COUNT, OUT, IN = 3, 4, 6


def inputs(seed, tokens=20, spread=1.0):
    """Inputs of COUNT experts, (tokens, IN), whose features differ in size by `spread` orders of magnitude."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-spread, spread, IN)
    return [rng.standard_normal((tokens, IN)) * sizes for _ in range(COUNT)]


def grams_of(given):
    return [torch.tensor(x.T @ x / len(x)) for x in given]


def merged(base, experts, given, **hyper):
    result = regmean(torch.tensor(base), [torch.tensor(e) for e in experts], grams=grams_of(given), **hyper)
    assert result.dtype == torch.float64
    return result.numpy()


def least_squares(experts, given, weights):
    """argmin_W of sum_i w_i |X_i (W - W_i)^T|^2 / tokens_i, as one tall system."""
    rows = [np.sqrt(w / len(x)) * x for x, w in zip(given, weights, strict=True)]
    targets = [row @ expert.T for row, expert in zip(rows, experts, strict=True)]
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0].T


@given(seed=SEEDS, weights=st.lists(st.floats(0.1, 3), min_size=COUNT, max_size=COUNT), spread=st.floats(0, 2))
def test_it_is_the_least_squares_fit_to_every_expert_on_its_own_inputs(models, seed, weights, spread):
    base, experts = models(seed, (OUT, IN))
    given = inputs(seed, spread=spread)
    actual = merged(base, experts, given, off_diagonal=1.0, ridge=0.0, weights=weights)
    np.testing.assert_allclose(actual, least_squares(experts, given, weights), atol=1e-8)


@given(seed=SEEDS, off_diagonal=st.floats(0, 1))
def test_the_papers_formula(models, seed, off_diagonal):
    base, experts = models(seed, (OUT, IN))
    given = inputs(seed)
    shrunk = [x.T @ x / len(x) * (off_diagonal + (1 - off_diagonal) * np.eye(IN)) for x in given]
    expected = sum(e @ g for e, g in zip(experts, shrunk, strict=True)) @ np.linalg.inv(sum(shrunk))
    actual = merged(base, experts, given, off_diagonal=off_diagonal, ridge=0.0)
    np.testing.assert_allclose(actual, expected, atol=1e-8)


@given(seed=SEEDS, tokens=st.integers(0, 2))
def test_directions_that_no_sample_touches_are_averaged(models, seed, tokens):
    base, experts = models(seed, (OUT, IN))
    given = [np.pad(x[:tokens, :4], ((0, max(0, 1 - tokens)), (0, 2))) for x in inputs(seed)]
    mean = sum(experts) / COUNT
    for ridge in (0.0, 1e-9):  # without one it is the pseudo-inverse that leaves them alone
        actual = merged(base, experts, given, off_diagonal=1.0, ridge=ridge)
        touched = np.linalg.svd(np.concatenate(given))[2][: np.linalg.matrix_rank(np.concatenate(given))]
        free = np.eye(IN) - touched.T @ touched
        np.testing.assert_allclose((actual - mean) @ free, 0, atol=1e-5)
        np.testing.assert_allclose(actual[:, 4:], mean[:, 4:], atol=1e-12)


def test_without_gram_matrices_it_is_the_weighted_average(models, run):
    base, experts = models(0, (OUT, IN))
    np.testing.assert_allclose(run(regmean, base, experts, weights=[1.0, 2.0, 1.0]), np.average(experts, 0, [1, 2, 1]))


@given(seed=SEEDS)
def test_equal_experts_one_expert_and_any_order(models, seed):
    base, experts = models(seed, (OUT, IN))
    given = inputs(seed)
    np.testing.assert_allclose(merged(base, [experts[0]] * COUNT, given), experts[0], atol=1e-12)
    np.testing.assert_allclose(merged(base, experts[:1], given[:1]), experts[0], atol=1e-12)
    np.testing.assert_allclose(merged(base, experts[::-1], given[::-1]), merged(base, experts, given), atol=1e-10)


def test_float32_inputs_lose_little_to_float32_gram_matrices(models, run):
    base, experts = models(0, (OUT, IN))
    given = inputs(0, spread=2.0)
    exact = merged(base, experts, given)
    rounded = run(regmean, base, experts, grams=[gram.float() for gram in grams_of(given)])
    np.testing.assert_allclose(rounded, exact, atol=1e-5)


def test_negative_weights_have_no_least_squares(models, run):
    base, experts = models(0, (OUT, IN))
    with pytest.raises(ConfigError, match="weights of 0 or more"):
        run(regmean, base, experts, weights=[1.0, -0.1, 1.0], grams=grams_of(inputs(0)))


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def gathered(trio, tmp_path):
    """Folders of Gram matrices as the stage leaves them, one entry for q, k and v, none for layer 1."""
    from rotrl.checkpoint.grams import GRAMS
    from rotrl.checkpoint.writer import write_json, write_weights

    def make(expert, name, size=16):
        folder = tmp_path / f"grams-{name}-{size}"
        folder.mkdir()
        x = torch.randn(40, size, generator=torch.Generator().manual_seed(ord(name[0])))
        sha256, _ = write_weights(folder, {Q: (size, size)}, torch.float32, lambda _: x.T @ x / 40)
        entries = {Q.replace("q_proj", f"{module}_proj"): Q for module in "qkv"}
        write_json(folder / GRAMS, {"entries": entries, "weights": expert.sha256, "tokens": 40, "sha256": sha256})
        return folder

    return lambda size=16: {name: make(expert, name, size) for name, expert in trio[1].items()}


def test_streamed_merge_equals_in_memory_and_tells_what_has_no_gram_matrix(trio, gathered, method, tmp_path):
    from rotrl.checkpoint.reader import open_checkpoint
    from rotrl.merge.engine import merge, merge_state

    folders, experts = gathered(), trio[1]
    result = merge(*trio, method("regmean"), tmp_path / "out", grams=folders)
    state = merge_state(*trio, method("regmean"), grams=folders)
    written = open_checkpoint(tmp_path / "out")
    for name, expected in state.items():
        assert torch.equal(written.read(name), expected)
        mean = sum(expert.read(name) for expert in experts.values()) / 2
        touched = any(f"layers.0.self_attn.{module}_proj.weight" in name for module in "qkv")
        assert torch.allclose(expected, mean, atol=1e-6) != touched
    assert result["warnings"] == [
        "11 tensors have no Gram matrix and are averaged, first 'model.layers.0.mlp.down_proj.weight'"
    ]
    assert merge(*trio, method("regmean"), tmp_path / "out", grams=folders)["reused"]


def test_other_gram_matrices_are_another_merge(trio, gathered, method, tmp_path):
    from rotrl.merge.engine import merge

    merge(*trio, method("regmean"), tmp_path / "out", grams=gathered())
    folders = {name: tmp_path / f"grams-{name}-16" for name in ("math", "code")}
    (folders["math"] / "grams.json").write_text(
        (folders["math"] / "grams.json").read_text().replace('"sha256": "', '"sha256": "0')
    )
    with pytest.raises(ConfigError, match=r"another merge \(other grams\.math\)"):
        merge(*trio, method("regmean"), tmp_path / "out", grams=folders)


def test_gram_matrices_that_do_not_fit(trio, gathered, method, tmp_path):
    from rotrl.merge.engine import merge_state

    regmean = method("regmean")
    with pytest.raises(ConfigError, match="needs Gram matrices"):
        merge_state(*trio, regmean)
    folders = gathered(15)
    with pytest.raises(CheckpointError, match=r"of shape \[15, 15\] is not of 'model\.layers\.0"):
        merge_state(*trio, regmean, grams=folders)
    exchanged = {"math": gathered()["code"], "code": tmp_path / "grams-math-16"}
    with pytest.raises(CheckpointError, match="other weights than those of expert 'math'"):
        merge_state(*trio, regmean, grams=exchanged)
    (exchanged["code"] / "grams.json").write_text('{"entries": {"a": "b"}}')
    with pytest.raises(CheckpointError, match="entry 'b' is absent"):
        merge_state(*trio, regmean, grams=exchanged)
