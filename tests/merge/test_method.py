"""bind: every shipped yaml is bound, and every wrong key, value, weight or count is named in one line."""

import inspect
from pathlib import Path

import pytest
import torch

from rotrl.checkpoint.layout import Role
from rotrl.errors import ConfigError
from rotrl.merge.bind import bind
from rotrl.merge.method import GIVEN, tensor_seed

NAMES = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "conf" / "merge").glob("*.yaml")
    if "\n_target_:" in path.read_text()
)
EXPERTS = ["math", "code"]
MATRIX, NORM = Role(0, "q"), Role(0, "norm")


def refusal(config, experts=EXPERTS):
    with pytest.raises(ConfigError) as caught:
        bind(config, experts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration_is_bound_and_is_the_signatures_default(name, shipped):
    method = bind(shipped(name), EXPERTS)
    assert method.name == name
    for key, parameter in inspect.signature(method.function).parameters.items():
        if key not in ("base", "experts", *GIVEN):
            assert method.hyper[key] == parameter.default, key


def test_what_needs_rotations(shipped):
    assert {name for name in NAMES if bind(shipped(name), EXPERTS).needs_rotations} == {"learned", "geodesic_aligned"}


def test_misspelt_key_names_the_nearest_and_all(shipped):
    text = refusal({**shipped("ties"), "denisty": 0.3})
    assert "merge.denisty" in text
    assert "'density'" in text
    assert "density, scale, normalize, threshold, scope, precision, per_layer, weights" in text


def test_all_faults_are_told_at_once(shipped):
    text = refusal({**shipped("ties"), "density": 30, "scale": "big", "normalize": 1, "scope": "some", "extra": 0})
    keys = ("merge.scale", "merge.normalize", "merge.scope", "merge.extra")
    for key in ("merge.density is 30, it must lie in (0, 1]", *keys):
        assert key in text


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ties", {"per_layer": {"threshold": {"q": "model"}}}),
        ("ram_plus", {"per_layer": {"threshold": {"q": 1.0}}}),
        ("svc", {"of": "ties"}),
        ("ties", {"density": -3}),
        ("ties", {"density": 0}),
        ("ties", {"density": True}),
        ("task_arithmetic", {"scale": float("nan")}),
        ("task_arithmetic", {"scale": None}),
        ("dare_ties", {"seed": 1.5}),
        ("orthomerge", {"anchor": -1}),
        ("orthomerge", {"side": "both"}),
        ("orthomerge", {"residual": "median"}),
        ("della", {"epsilon": 1.5}),
        ("breadcrumbs", {"gamma": -0.1}),
        ("consensus", {"k": 0}),
        ("consensus", {"k": 1.5}),
        ("consensus", {"lam": -1}),
        ("sce", {"select_topk": 0}),
        ("ram", {"threshold": -1e-5}),
        ("ram", {"relative": 1}),
        ("ram_plus", {"rescale": 0.5}),
        ("nuslerp", {"axis": "rows"}),
        ("nuslerp", {"vectors": "delta"}),
        ("karcher", {"max_iter": 0}),
        ("karcher", {"tol": 0}),
        ("iso_cts", {"common_fraction": 1.1}),
        ("rewiring", {"svd_rank": 0}),
        ("rewiring", {"delta_fraction": 0}),
        ("resmerge", {"head": -1}),
        ("wudi", {"iters": -1}),
        ("wudi", {"lr": 0}),
        ("coram", {"height": 0}),
        ("coram", {"kappa": -1}),
        ("svc", {"alpha": 0}),
        ("subspace_boosting", {"beta": 2}),
        ("spectrum_projection", {"reference": "code"}),
        ("iso_merger", {"keep": 1.1}),
        ("iso_merger", {"solver": "fast"}),
        ("orthomerge", {"variant": "local"}),
        ("chordal", {"side": "both"}),
        ("slerp", {"weights": {"math": 1, "code": 1}}),
        ("linear", {"weights": [1, 1]}),
        ("linear", {"weights": {"math": 1}}),
        ("linear", {"weights": {"math": 1, "cod": 1}}),
        ("linear", {"weights": {"math": 1, "code": "x"}}),
        ("linear", {"rotation": 1}),
    ],
)
def test_wrong_values(name, change, shipped):
    assert f"merge.{next(iter(change))}" in refusal({**shipped(name), **change})


@pytest.mark.parametrize("density", [[0.5, 0.95], {"q": 0.95}])
def test_values_by_layer_that_do_not_go_together(density, shipped):
    assert "merge.density=0.95 and merge.epsilon=0.15" in refusal(shipped("della", per_layer={"density": density}))
    together = {"density": {"q": 0.95}, "epsilon": {"q": 0.02}}
    assert bind(shipped("della", per_layer=together), EXPERTS).per_layer == together


@pytest.mark.parametrize(
    "target", ["", "ties", "rotrl.merge.sparse.tyes", "no.such.module.f", "rotrl.merge.sparse.trim"]
)
def test_wrong_targets(target):
    assert "merge._target_" in refusal({"_target_": target})


def test_counts_of_experts(shipped):
    for name in ("slerp", "nuslerp", "geodesic", "geodesic_aligned", "interpolation"):
        assert "merges two experts, not 3 (a, b, c)" in refusal(shipped(name), ["a", "b", "c"])
    assert "no experts" in refusal(shipped("linear"), [])


def test_weights_follow_the_order_of_experts(shipped):
    method = bind(shipped("linear", weights={"code": 3, "math": 1}), EXPERTS)
    assert method.hyper["weights"] == [1.0, 3.0]


def call(method, role, shape=(4, 4), **given):
    base = torch.zeros(shape)
    return method("name", role, base, [base + 1, base + 3], **given)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "orthomerge", "lie_sum", "split_task_arithmetic"])
def test_other_tensors_go_by_task_arithmetic_at_the_same_scale(name, method):
    merged = call(method(name, scale=0.5), NORM, (4,))
    assert torch.equal(merged, torch.full((4,), 2.0))
    weighted = call(method("lie_sum", scale=0.5, weights={"math": 2.0, "code": 0.0}), NORM, (4,))
    assert torch.equal(weighted, torch.ones(4))


def test_other_tensors_of_a_path_go_by_the_chord(method):
    assert torch.equal(call(method("geodesic", t=0.25), NORM, (4,)), torch.full((4,), 1.5))


def test_scope_of_elementwise_methods(method):
    assert torch.equal(call(method("ties", scope="matrices", scale=1.0), NORM, (4,)), torch.full((4,), 2.0))
    added = method("ties", scope="matrices", scale=1.0, normalize=False)
    assert torch.equal(call(added, NORM, (4,)), torch.full((4,), 4.0))
    by_module = method("ties", scope="matrices", scale=1.0, per_layer={"normalize": {"norm": False}})
    assert torch.equal(call(by_module, NORM, (4,)), torch.full((4,), 4.0))
    assert torch.equal(call(method("ties", scope="all", scale=1.0), NORM, (4,)), torch.full((4,), 2.0))


def test_matrix_methods_never_see_vectors(method):
    everything = method("orthomerge", scope="all")
    assert everything.acts_on(Role(None, "embedding"), 2)
    assert not everything.acts_on(NORM, 1)
    assert not method("orthomerge").acts_on(Role(None, "embedding"), 2)
    assert method("ties").acts_on(NORM, 1)


def test_each_tensor_has_its_own_seed(method):
    dare = method("dare_ties")
    base = torch.zeros(40, 40)
    first, again, other = (dare(name, MATRIX, base, [base + 1, base + 1]) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= tensor_seed(0, "a") < 2**63
    assert tensor_seed(0, "a") != tensor_seed(1, "a")
