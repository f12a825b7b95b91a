"""Matrix methods against float64 numpy and scipy oracles; first-order slopes; wide matrices stay well-posed."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rotrl.checkpoint.rotations import Rotation
from rotrl.errors import ConfigError, NumericsError
from rotrl.linalg import small
from rotrl.linalg.rotation import exp
from rotrl.linalg.tangent import generator, tangent_projection
from rotrl.merge import rotation
from rotrl.merge.linear import task_arithmetic
from rotrl.merge.rotation import (
    geodesic,
    geodesic_aligned,
    how,
    learned,
    lie_sum,
    orthomerge,
    sequential,
    split_task_arithmetic,
)
from rotrl.merge.subspace import iso_c, tsv_m

SHAPES = [(5, 5), (2, 9), (3, 7), (8, 3)]
SEEDS = st.integers(0, 10**6)
SIDED = pytest.mark.parametrize("side", ["left", "right"])
SHAPED = pytest.mark.parametrize("shape", SHAPES)


def models(shape, seed=0, count=2, size=0.1):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base, [base + size * rng.standard_normal(shape) for _ in range(count)]


def run(function, base, experts, **hyper):
    return function(torch.tensor(base), [torch.tensor(e) for e in experts], **hyper).numpy()


def fit(source, target, side, anchor):
    """The anchored Procrustes rotation by scipy's polar decomposition."""
    if side == "left":
        return fit(source.T, target.T, "right", anchor).T
    mu = anchor * (source**2).sum() / min(source.shape)
    return scipy.linalg.polar(source.T @ target + mu * np.eye(source.shape[1]))[0]


def turn(w, r, side):
    return w @ r if side == "right" else r @ w


def cayley_generator(r):
    identity = np.eye(len(r))
    return np.linalg.inv(r + identity) @ (r - identity)


def oracle_orthomerge(base, experts, scale, residual_scale, side, anchor):
    rotations = [fit(base, w, side, anchor) for w in experts]
    generators = [cayley_generator(r) for r in rotations]
    total = sum(generators)
    q = scale * np.mean([np.linalg.norm(g) for g in generators]) * total / np.linalg.norm(total)
    identity = np.eye(len(q))
    merged = turn(base, np.linalg.inv(identity - q) @ (identity + q), side)
    return merged + scale * residual_scale * sum(
        w - turn(base, r, side) for w, r in zip(experts, rotations, strict=True)
    )


@SIDED
@SHAPED
@given(seed=SEEDS, scale=st.floats(0, 1.5), lam=st.floats(0, 1))
def test_orthomerge(side, shape, seed, scale, lam):
    base, experts = models(shape, seed)
    expected = oracle_orthomerge(base, experts, scale, lam, side, 0.01)
    actual = run(orthomerge, base, experts, scale=scale, residual_scale=lam, side=side)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


@given(seed=SEEDS)
def test_orthomerge_as_published_on_tall_matrices(seed):
    base, experts = models((9, 4), seed)
    expected = oracle_orthomerge(base, experts, 1.0, 0.2, "right", 0.0)
    np.testing.assert_allclose(run(orthomerge, base, experts, anchor=0.0), expected, atol=1e-9)


def test_orthomerge_merges_residuals_by_the_named_method():
    base, experts = models((8, 3))
    parts = {name: run(orthomerge, base, experts, residual=name) for name in ("task_arithmetic", "ties", "tsv_m")}
    rotations = [fit(base, w, "right", 0.01) for w in experts]
    rest = [w - base @ r for w, r in zip(experts, rotations, strict=True)]
    turned = parts["task_arithmetic"] - 0.2 * sum(rest)
    zero = np.zeros_like(base)
    for name, function, hyper in (("ties", rotation.ties, {"density": 0.2}), ("tsv_m", tsv_m, {})):
        expected = turned + run(function, zero, rest, scale=0.2, **hyper)
        np.testing.assert_allclose(parts[name], expected, atol=1e-12)


@SIDED
@SHAPED
@given(seed=SEEDS, weights=st.lists(st.floats(0.2, 2), min_size=2, max_size=2), scale=st.floats(0, 1))
def test_lie_sum(side, shape, seed, weights, scale):
    base, experts = models(shape, seed)
    rotations = [fit(base, w, side, 0.01) for w in experts]
    logs = sum(c * scipy.linalg.logm(r).real for c, r in zip(weights, rotations, strict=True))
    rest = sum(c * (w - turn(base, r, side)) for c, w, r in zip(weights, experts, rotations, strict=True))
    expected = turn(base, scipy.linalg.expm(scale * logs), side) + scale * rest
    actual = run(lie_sum, base, experts, side=side, weights=weights, scale=scale)
    np.testing.assert_allclose(actual, expected, atol=1e-8)


def in_turn(base, rotations, weights, side):
    """The first expert's rotation is applied first."""
    for c, r in zip(weights, rotations, strict=True):
        base = turn(base, scipy.linalg.expm(c * scipy.linalg.logm(r).real), side)
    return base


@SIDED
@SHAPED
@given(seed=SEEDS, weights=st.lists(st.floats(0.2, 2), min_size=3, max_size=3), scale=st.floats(0, 1))
def test_sequential(side, shape, seed, weights, scale):
    base, experts = models(shape, seed, count=3, size=0.1)
    rotations, amounts = [fit(base, w, side, 0.01) for w in experts], [scale * c for c in weights]
    rest = sum(c * (w - turn(base, r, side)) for c, w, r in zip(amounts, experts, rotations, strict=True))
    expected = in_turn(base, rotations, amounts, side) + 0.7 * rest
    actual = run(sequential, base, experts, side=side, weights=weights, scale=scale, residual_scale=0.7)
    np.testing.assert_allclose(actual, expected, atol=1e-8)


@SHAPED
def test_the_order_of_a_sequence_matters_to_second_order(shape):
    base, experts = models(shape, size=1.0)

    def difference(h):
        ws = [base + h * (w - base) for w in experts]
        return np.linalg.norm(run(sequential, base, ws) - run(sequential, base, ws[::-1]))

    assert slope(difference) == pytest.approx(2, abs=0.15)


@SIDED
@SHAPED
@given(seed=SEEDS, t=st.floats(0, 1))
def test_geodesic(side, shape, seed, t):
    base, (a, b) = models(shape, seed, size=0.05)
    r = fit(a, b, side, 0.01)
    expected = turn(a, scipy.linalg.expm(t * scipy.linalg.logm(r).real), side) + t * (b - turn(a, r, side))
    np.testing.assert_allclose(run(geodesic, base, [a, b], t=t, side=side), expected, atol=1e-8)


@SIDED
@SHAPED
def test_geodesic_ends_in_the_experts(side, shape):
    base, (a, b) = models(shape)
    np.testing.assert_allclose(run(geodesic, base, [a, b], t=0.0, side=side), a, atol=1e-12)
    np.testing.assert_allclose(run(geodesic, base, [a, b], t=1.0, side=side), b, atol=1e-12)


@SIDED
@SHAPED
@given(seed=SEEDS, alpha=st.floats(-1, 2), beta=st.floats(-1, 2))
def test_split_task_arithmetic(side, shape, seed, alpha, beta):
    """The projection by brute force: least squares over a basis of the tangent space."""
    base, experts = models(shape, seed)
    n = shape[1] if side == "right" else shape[0]
    columns = []
    for i in range(n):
        for j in range(i):
            a = np.zeros((n, n))
            a[i, j], a[j, i] = 1, -1
            columns.append(turn(base, a, side).ravel())
    d = sum(experts) - 2 * base
    basis = np.array(columns).T
    projected = (basis @ np.linalg.lstsq(basis, d.ravel(), rcond=1e-10)[0]).reshape(shape)
    expected = base + 0.8 * (alpha * projected + beta * (d - projected))
    actual = run(split_task_arithmetic, base, experts, scale=0.8, alpha=alpha, beta=beta, side=side)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


@SHAPED
@given(seed=SEEDS, scale=st.floats(0, 2))
def test_tsv_m(shape, seed, scale):
    base, experts = models(shape, seed)
    rank = max(1, min(shape) // 2)
    triplets = [np.linalg.svd(w - base, full_matrices=False) for w in experts]
    u = np.hstack([u[:, :rank] for u, _, _ in triplets])
    s = np.concatenate([s[:rank] for _, s, _ in triplets])
    v = np.vstack([vh[:rank] for _, _, vh in triplets]).T
    pu, _, qu = np.linalg.svd(u, full_matrices=False)
    pv, _, qv = np.linalg.svd(v, full_matrices=False)
    expected = base + scale * (pu @ qu) @ np.diag(s) @ (pv @ qv).T
    np.testing.assert_allclose(run(tsv_m, base, experts, scale=scale), expected, atol=1e-9)


def test_tsv_m_of_one_expert_is_that_expert():
    base, experts = models((5, 4), count=1)
    np.testing.assert_allclose(run(tsv_m, base, experts), experts[0], atol=1e-12)


def test_tsv_m_adds_tasks_of_orthogonal_subspaces():
    """Where the singular vectors of the tasks are orthogonal already, nothing is lost: task arithmetic."""
    base = np.zeros((4, 4))
    experts = [np.diag([3.0, 1, 0, 0]), np.diag([0, 0, 2.0, 1])]
    np.testing.assert_allclose(run(tsv_m, base, experts), sum(experts), atol=1e-12)


@SHAPED
@given(seed=SEEDS, scale=st.floats(0, 2))
def test_iso_c(shape, seed, scale):
    base, experts = models(shape, seed)
    u, s, vh = np.linalg.svd(sum(experts) - 2 * base, full_matrices=False)
    expected = base + scale * u @ np.diag(np.full_like(s, s.mean())) @ vh
    np.testing.assert_allclose(run(iso_c, base, experts, scale=scale), expected, atol=1e-9)


def test_experts_that_equal_the_base_change_nothing():
    base, _ = models((3, 7))
    for function in (tsv_m, iso_c, orthomerge, lie_sum, sequential, geodesic, split_task_arithmetic):
        np.testing.assert_allclose(run(function, base, [base, base]), base, atol=1e-12)


@SIDED
@SHAPED
@pytest.mark.parametrize(
    ("function", "hyper"),
    [
        (orthomerge, {"residual_scale": 0.5}),
        (lie_sum, {"weights": [0.5, 0.5]}),
        (split_task_arithmetic, {"scale": 0.5, "beta": 1.0}),
        (geodesic, {"t": 0.4}),
    ],
)
def test_equal_experts_give_that_expert(side, shape, function, hyper):
    base, (expert, _) = models(shape)
    np.testing.assert_allclose(run(function, base, [expert, expert], side=side, **hyper), expert, atol=1e-10)


@SIDED
@SHAPED
@pytest.mark.parametrize("function", [orthomerge, lie_sum, split_task_arithmetic, tsv_m, iso_c])
def test_one_expert_at_scale_1_and_any_at_scale_0(side, shape, function):
    base, experts = models(shape)
    hyper = {orthomerge: {"residual_scale": 1.0}, split_task_arithmetic: {"beta": 1.0}}.get(function, {})
    hyper = hyper | ({} if function in (tsv_m, iso_c) else {"side": side})
    if function is not iso_c:  # which flattens even a single spectrum
        np.testing.assert_allclose(run(function, base, experts[:1], **hyper), experts[0], atol=1e-10)
    np.testing.assert_allclose(run(function, base, experts, scale=0.0, **hyper), base, atol=1e-12)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return made


def slope(difference):
    return math.log10(difference(1e-2) / difference(1e-3))


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 7)])
def test_orthomerge_is_split_task_arithmetic_to_first_order(shape):
    """Its alpha is mean|Q_k| / |sum Q_k|; the difference falls with the square of the update."""
    base, experts = models(shape, seed=3, size=1.0)
    w0 = torch.tensor(base)

    def difference(h):
        ws = [base + h * (w - base) for w in experts]
        a = [generator(w0, torch.tensor(w - base), side="right") for w in ws]
        alpha = float(torch.stack([x.norm() for x in a]).mean() / sum(a).norm())
        exact = run(orthomerge, base, ws, anchor=1e-12)
        return np.linalg.norm(exact - run(split_task_arithmetic, base, ws, alpha=alpha, beta=0.2))

    assert slope(difference) == pytest.approx(2, abs=0.15)


@SHAPED
def test_lie_sum_is_task_arithmetic_to_first_order(shape):
    base, experts = models(shape, size=1.0)

    def difference(h):
        ws = [base + h * (w - base) for w in experts]
        return np.linalg.norm(run(lie_sum, base, ws) - run(task_arithmetic, base, ws))

    assert slope(difference) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("shape", [(4, 16), (8, 48)])
def test_wide_matrices_stay_near_the_experts_when_anchored(shape):
    """Unanchored, the singular vectors of the null space are arbitrary and the merge is off by many updates."""
    for seed in range(20):
        base, experts = models(shape, seed, size=1e-3)
        update = max(np.linalg.norm(w - base) for w in experts)
        assert np.linalg.norm(run(orthomerge, base, experts) - base) < 2 * update


def test_unanchored_reflections_are_refused():
    refused = 0
    for seed in range(20):
        base, experts = models((4, 16), seed, size=1e-3)
        try:
            run(orthomerge, base, experts, anchor=0.0)
        except NumericsError as error:
            refused += "-1" in str(error)
    assert refused > 5


@SIDED
@SHAPED
@pytest.mark.parametrize("function", [orthomerge, lie_sum, sequential, geodesic])
def test_large_updates_are_solved_exactly(function, side, shape, monkeypatch):
    """By singular values where the update is not small; both ways give the same merge."""
    base, experts = models(shape, seed=1)
    quick = run(function, base, experts, side=side)
    monkeypatch.setattr(small, "small_turns", lambda *a, **k: None)
    np.testing.assert_allclose(quick, run(function, base, experts, side=side), atol=1e-10)


@SIDED
@pytest.mark.parametrize("function", [orthomerge, lie_sum, sequential, geodesic, split_task_arithmetic])
def test_no_matrix_is_larger_than_the_models(function, side):
    """A rotation of the long side would be 90 x 90."""
    shape = (4, 90) if side == "right" else (90, 4)
    base, experts = models(shape, size=1e-3)
    with Largest() as largest:
        run(function, base, experts, side=side)
    assert largest.entries <= 3 * 4 * 90


def test_the_plan_says_which_side_and_how():
    assert how((8960, 1536), "right") == "right side, 1536 columns"
    assert how((8960, 1536), "left") == "left side, 8960 rows by 1536 x 1536 matrices"
    assert how((1536, 8960), "right") == "right side, 8960 columns by 1536 x 1536 matrices"


def planted(shape, left=True, right=True):
    def random(n, seed):
        a = torch.tensor(np.random.default_rng(seed).standard_normal((n, n)))
        return exp(0.1 * (a - a.mT)).float()

    return Rotation(random(shape[0], 1) if left else None, random(shape[1], 2) if right else None)


def test_learned_rotates_its_source_and_leaves_the_rest():
    base = torch.ones(3, 5)
    source = torch.arange(15.0).reshape(3, 5)
    r = planted((3, 5))
    torch.testing.assert_close(learned(base, [base], source=source, rotation=r), r.left @ source @ r.right)
    assert learned(base, [base], source=source, rotation=None) is source


@pytest.mark.parametrize(("left", "right"), [(True, False), (False, True), (True, True), (False, False)])
def test_geodesic_aligned_goes_from_the_first_expert_to_the_second(left, right):
    _, (a, b) = models((3, 5))
    a, b = torch.tensor(a).float(), torch.tensor(b).float()
    r = planted((3, 5), left, right) if left or right else None
    for t, expected in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(geodesic_aligned(a, (a, b), source=a, rotation=r, t=t), expected)
    if r is None:
        torch.testing.assert_close(geodesic_aligned(a, (a, b), source=a, rotation=r, t=0.25), a + 0.25 * (b - a))
    exact = r.apply(a) if r else a
    half = geodesic_aligned(a, (a, exact), source=a, rotation=r, t=0.5)
    assert half.norm() == pytest.approx(a.norm().item(), rel=1e-5)


def test_geodesic_aligned_refuses_rotations_of_other_weights():
    _, (a, b) = models((3, 5))
    a, b = torch.tensor(a), torch.tensor(b)
    with pytest.raises(ConfigError, match="source="):
        geodesic_aligned(a, (a, b), source=b, rotation=None)


def test_projection_parts_are_orthogonal():
    """split_task_arithmetic with beta 0 is the projection itself: what it drops is orthogonal to what it keeps."""
    base, experts = models((5, 5), count=1)
    kept = run(split_task_arithmetic, base, experts, beta=0.0) - base
    dropped = experts[0] - base - kept
    assert abs((kept * dropped).sum()) < 1e-12
    expected = tangent_projection(torch.tensor(base), torch.tensor(experts[0] - base), side="right")
    np.testing.assert_allclose(kept, expected.numpy(), atol=1e-12)
