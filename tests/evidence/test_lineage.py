"""Verdicts on families whose descent is known."""

import csv

import pytest
import torch

from rotrl.errors import CheckpointError
from rotrl.evidence.consequences import FAMILIES
from rotrl.evidence.kinship import Sums
from rotrl.evidence.lineage import COLUMNS, lineage


def run(family, base, experts, **options):
    saved = {name: family.save(name, state) for name, state in experts.items()}
    return lineage(family.save("base", base), saved, family.folder / "out", **options)


def table(family):
    with (family.folder / "out" / "lineage.csv").open() as file:
        return list(csv.DictReader(file))


def test_siblings(family):
    base = family.weights(0)
    seen = []
    a, b = family.moved(base, 1), family.moved(base, 2)
    found = run(family, base, {"math": a, "code": b}, progress=lambda *x: seen.append(x))
    (pair,) = found["pairs"]
    assert found["verdict"] == pair["verdict"] == "siblings"
    assert abs(pair["cosine"]) < 0.05
    assert "squared distance is 1.0" in found["words"]
    assert tuple(found["consequences"]) == FAMILIES
    assert seen[-1] == (len(base), len(base))
    rows = table(family)
    assert list(rows[0]) == COLUMNS
    assert [row["tensor"] for row in rows] == [*sorted(base), "all"]
    name = "model.layers.2.mlp.down_proj.weight"
    row = next(row for row in rows if row["tensor"] == name)
    da, db = ((x[name] - base[name]).double() for x in (a, b))
    assert float(row["norm_a"]) == pytest.approx(float(da.norm()))
    assert float(row["norm_ab"]) == pytest.approx(float((da - db).norm()))
    assert float(row["cosine"]) == pytest.approx(float((da * db).sum() / da.norm() / db.norm()))
    assert (row["layer"], row["module"], row["dtype"]) == ("2", "down", "float32")
    assert float(rows[-1]["norm_a"]) ** 2 == pytest.approx(sum(float(row["norm_a"]) ** 2 for row in rows[:-1]))


@pytest.mark.parametrize("step", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("order", [1, -1])
def test_descendants_of_any_further_step_and_order(family, step, order):
    base = family.weights(0)
    parent = family.moved(base, 1)
    experts = {"math": parent, "code": family.moved(parent, 2, step)}
    found = run(family, base, dict(list(experts.items())[::order]))
    assert found["verdict"] == "descendant"
    assert (found["pairs"][0]["parent"], found["pairs"][0]["child"]) == ("math", "code")
    assert "counts math's update twice" in found["consequences"]["task_arithmetic"]
    assert "code descends from math" in found["words"]
    own, given = (
        sum(float((x[name] - y[name]).double().square().sum()) for name in base) ** 0.5
        for x, y in ((experts["code"], parent), (parent, base))
    )
    assert f"code is math trained on, moved by {own / given:.2f} of math's update" in found["words"]


def test_siblings_with_a_common_direction_are_not_taken_for_parent_and_child(family):
    base, shared = family.weights(0), family.moved(family.weights(0), 5, 0.09)
    experts = {name: family.moved(shared, seed) for name, seed in (("rl", 1), ("sft", 2))}
    found = run(family, base, experts)
    assert found["pairs"][0]["cosine"] == pytest.approx(0.76, abs=0.03)
    assert found["verdict"] == "siblings"
    assert "common direction" in found["words"]
    assert "lower scale" in found["consequences"]["task_arithmetic"]


def test_bf16_child_inherits_the_bits_of_its_parent(family):
    base = {name: tensor.bfloat16() for name, tensor in family.weights(0).items()}
    parent = {name: tensor.bfloat16() for name, tensor in family.moved(base, 1, 0.01).items()}
    child = {name: tensor.bfloat16() for name, tensor in family.moved(parent, 2, 0.001).items()}
    found = run(family, base, {"math": parent, "code": child})
    assert found["verdict"] == "descendant"
    assert found["pairs"][0]["inherited"] > 0.5
    assert "same bits" in found["words"]


def test_unrelated(family):
    base = family.weights(0)
    found = run(family, base, {"math": family.moved(base, 1), "code": family.weights(7)})
    assert found["verdict"] == "unrelated"
    assert "code was not trained from this base" in found["words"]
    assert found["experts"]["math"]["verdict"] == "descendant"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("widened", [False, True])
def test_copies_and_rounded_copies(family, dtype, widened):
    base = family.weights(0)
    expert = family.moved(base, 1)
    copy = {name: tensor.to(getattr(torch, dtype)) for name, tensor in expert.items()}
    copy = {name: tensor.float() for name, tensor in copy.items()} if widened else copy
    found = run(family, base, {"math": expert, "copy": copy})
    assert found["verdict"] == "identical"
    expected = "same weights" if dtype == "float32" else f"copy is a {dtype} copy of math"
    assert expected in found["words"]
    if dtype != "float32" and not widened:
        assert table(family)[0]["dtype"] == f"float32/float32/{dtype}"


def test_expert_that_is_a_copy_of_the_base(family):
    base = family.weights(0)
    found = run(family, base, {"math": family.moved(base, 1), "base_again": base})
    assert found["verdict"] == "identical"
    assert found["words"] == "base_again holds the same weights as base"
    assert found["pairs"][0]["cosine"] is None


def test_the_gravest_verdict_of_three_experts_stands(family):
    base = family.weights(0)
    math = family.moved(base, 1)
    found = run(family, base, {"math": math, "code": family.moved(math, 2), "chat": family.moved(base, 3)})
    assert [pair["verdict"] for pair in found["pairs"]] == ["descendant", "siblings", "siblings"]
    assert found["verdict"] == "descendant"
    assert [row["tensor"] for row in table(family)].count("all") == 3


def test_one_expert_alone_is_compared_with_the_base(family):
    base = family.weights(0)
    found = run(family, base, {"math": family.matrices(base, lambda W, i: 1.1 * W)})
    assert (found["verdict"], found["pairs"]) == ("siblings", [])
    assert found["experts"]["math"]["outside_matrices"] == 0
    assert table(family)[-1]["norm_b"] == ""


def test_energy_outside_the_matrices_is_told(family):
    base = family.weights(0)
    found = run(family, base, {"math": family.moved(base, 1), "code": family.moved(base, 2)})
    assert found["experts"]["math"]["outside_matrices"] > 0.01
    assert "outside the matrices" in found["experts"]["math"]["words"]


def test_models_that_do_not_fit_are_refused(family):
    base = family.weights(0)
    other = {name: tensor for name, tensor in base.items() if "embed" not in name}
    with pytest.raises(CheckpointError, match="embed_tokens"):
        run(family, base, {"math": other})


def test_chunks_do_not_change_the_sums(family, monkeypatch):
    base = family.weights(0)
    saved = {name: family.save(name, family.moved(base, i)) for i, name in enumerate(("math", "code"), 1)}
    opened = family.save("base", base)
    whole = lineage(opened, saved, family.folder / "whole")
    monkeypatch.setattr("rotrl.evidence.lineage.CHUNK", 7)
    parts = lineage(opened, saved, family.folder / "parts")
    assert parts["pairs"][0]["cosine"] == pytest.approx(whole["pairs"][0]["cosine"])
    assert parts["words"] == whole["words"]


def test_exchanging_the_experts_twice_changes_nothing():
    sums = Sums(*range(11))
    assert sums.swapped.swapped == sums
    assert sums.swapped.a2 == sums.b2
