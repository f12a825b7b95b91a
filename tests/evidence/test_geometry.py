"""The stage end to end on fake checkpoints whose updates are known."""

import csv

import numpy as np
import pytest
import torch

import rotrl.evidence.batches as batches_module
import rotrl.evidence.geometry as geometry_module
from rotrl.checkpoint.reader import open_checkpoint
from rotrl.config import compose
from rotrl.errors import CheckpointError, ConfigError
from rotrl.evidence.batches import batches, matrix_bytes
from rotrl.evidence.geometry import geometry
from rotrl.evidence.measure import COLUMNS
from rotrl.evidence.nulls import CONTROLS
from rotrl.evidence.summary import bootstrap_median
from rotrl.evidence.verdict import Thresholds, judge, overall_verdict


def rotated(W, i, side="left", angle=0.05):
    d = W.shape[0] if side == "left" else W.shape[1]
    A = torch.randn(d, d, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    R = torch.matrix_exp(angle * (A - A.mT) / d**0.5)
    return (R @ W.double() if side == "left" else W.double() @ R).float()


def stretched(W, i):
    """A symmetric change that lives between singular vectors; on a flat spectrum nothing of it is a rotation."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    H = torch.randn(len(s), len(s), generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return (W.double() + 0.05 * U @ (H + H.mT) @ Vh).float()


def flat(W, i):
    """The same singular vectors with singular values from 1 to 1.2."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U @ torch.diag(torch.linspace(1.2, 1.0, len(s)).double()) @ Vh).float()


@pytest.fixture
def base(family):
    return family.matrices(family.weights(0), flat)


def run(family, base, experts, **options):
    saved = {name: family.save(name, state) for name, state in experts.items()}
    return geometry(family.save("base", base), saved, family.folder / "out", **options)


def table(family):
    with (family.folder / "out" / "geometry.csv").open() as file:
        return list(csv.DictReader(file))


def test_rotation_noise_and_stretch_are_told_apart(family, base):
    seen = []
    experts = {
        "turned": family.matrices(base, rotated),
        "noisy": family.moved(base, 1, 0.02),
        "stretched": family.matrices(base, stretched),
    }
    found = run(family, base, experts, progress=lambda *x: seen.append(x))
    verdicts = {name: value["verdict"] for name, value in found["experts"].items()}
    assert verdicts["turned"] == "rotation"
    assert verdicts["stretched"] == "stretch"
    assert verdicts["noisy"] in ("none", "undecided")  # 28 tiny matrices: the interval may be wider than .05
    assert seen[-1] == (28, 28)
    assert found["verdict"].startswith("Rotation in turned, not shown in noisy and stretched")
    assert found["unmoved"] == []

    pooled = {(row["expert"], row["side"]): row for row in found["rows"] if row["module"] == "all"}
    assert pooled["turned", "left"]["kappa_median"] > 0.95
    assert pooled["turned", "left"]["fraction_median"] > 0.95
    assert pooled["turned", "left"]["nu_median"] < 0.01
    assert abs(pooled["noisy", "right"]["kappa_median"]) < 0.1
    control = next(c for c in found["controls"] if c["expert"] == "noisy" and c["control"] == "isotropic")
    assert pooled["noisy", "right"]["nu_median"] == pytest.approx(control["nu_median"], rel=0.1)
    assert pooled["stretched", "left"]["kappa_low"] < pooled["stretched", "left"]["kappa_high"] < -0.3
    modules = ["all", "q", "k", "v", "o", "gate", "up", "down"]
    assert sorted({row["module"] for row in found["rows"]}) == sorted(modules)


def test_the_table_holds_every_matrix_side_and_control(family, base):
    run(family, base, {"turned": family.matrices(base, rotated)}, planted=(0.0, 0.3, 1.0))
    rows = table(family)
    assert list(rows[0]) == COLUMNS
    controls = ["", *CONTROLS, "planted_0", "planted_0.3", "planted_1"]
    assert len(rows) == 28 * 2 * len(controls)
    first = [row for row in rows if row["tensor"] == "model.layers.0.self_attn.k_proj.weight"]
    assert [row["control"] for row in first if row["side"] == "left"] == controls
    real = first[0]
    assert (real["rows"], real["cols"], real["layer"], real["module"]) == ("8", "24", "0", "k")
    assert all(real[column] != "" for column in COLUMNS if column != "control")
    low, kappa, high = (float(real[key]) for key in ("kappa_low", "kappa", "kappa_high"))
    assert low < kappa < high
    assert kappa == pytest.approx((float(real["share"]) - float(real["null"])) / (1 - float(real["null"])), abs=1e-6)
    exact = [row for row in first if row["control"] == "planted_1"]
    assert [float(row["kappa"]) for row in exact] == pytest.approx([1, 1])
    assert {row["nu"] for row in exact} == {""}


def test_rows_do_not_depend_on_what_is_measured_beside(family, base):
    experts = {"noisy": family.moved(base, 1), "other": family.moved(base, 2)}
    run(family, base, experts)
    both = [row for row in table(family) if row["expert"] == "noisy"]
    saved = family.save("noisy_again", experts["noisy"])
    opened = family.save("base_again", base)
    geometry(opened, {"noisy": saved}, family.folder / "alone", controls=["sign_flip"], planted=[0.3])
    with (family.folder / "alone" / "geometry.csv").open() as file:
        alone = list(csv.DictReader(file))
    kept = ("", "sign_flip", "planted_0.3")
    assert alone == [row for row in both if row["control"] in kept]


def test_a_killed_measurement_goes_on_and_gives_the_same_table(family, base, monkeypatch):
    experts = {"noisy": family.save("noisy", family.moved(base, 1))}
    opened, out = family.save("base", base), family.folder / "out"
    whole = geometry(opened, experts, family.folder / "whole", batch=4)

    def killed(done, total):
        if done == 8:  # the second batch of four
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        geometry(opened, experts, out, batch=4, progress=killed)
    with (out / "geometry.work.jsonl").open("a") as file:
        file.write('["model.layers.0.')  # torn by the kill
    measured = []
    original = geometry_module.measure
    monkeypatch.setattr(geometry_module, "measure", lambda *x: measured.extend(x[2]) or original(*x))
    assert geometry(opened, experts, out, batch=4) == whole
    assert len(measured) == 28 - 8
    assert sorted(path.name for path in out.iterdir()) == ["bands.csv", "geometry.csv"]
    for path in out.iterdir():
        assert path.read_bytes() == (family.folder / "whole" / path.name).read_bytes()


def test_a_model_of_another_base_stands_beside_with_the_rows_that_it_has_alone(family, base):
    root = family.matrices(family.weights(7), flat)
    states = {"base": base, "rl": family.moved(base, 1), "root": root, "other": family.matrices(root, rotated)}
    saved = {name: family.save(name, state) for name, state in states.items()}
    pair, options = (saved["root"], saved["other"]), {"controls": ["isotropic"], "planted": [0.3], "bootstrap": 10}
    seen = []
    found = geometry(
        saved["base"],
        {"rl": saved["rl"]},
        family.folder / "out",
        others={"other": pair},
        progress=lambda *x: seen.append(x),
        **options,
    )
    geometry(pair[0], {"other": pair[1]}, family.folder / "alone", **options)
    with (family.folder / "alone" / "geometry.csv").open() as file:
        assert list(csv.DictReader(file)) == [row for row in table(family) if row["expert"] == "other"]
    assert found["experts"]["other"]["verdict"] == "rotation"
    assert found["verdict"].startswith("Rotation in other, not shown in rl")
    assert found["pairs"] == []
    assert seen[-1] == (56, 56)
    assert not list((family.folder / "out").glob("*.jsonl"))


def test_matrices_have_the_same_rows_in_any_batch(family, base):
    """Seven shapes of four layers each, one matrix unmoved; draws belong to the tensor and not to its place."""
    still = "model.layers.1.mlp.up_proj.weight"
    states = [family.moved(base, 1) | {still: base[still]}, family.matrices(base, rotated)]
    experts = {name: family.save(name, state) for name, state in zip(("noisy", "turned"), states, strict=True)}
    opened = family.save("base", base)
    tables = {}
    for batch in (1, 2, 5):
        out = family.folder / str(batch)
        assert geometry(opened, experts, out, batch=batch, bootstrap=10)["unmoved"] == [f"noisy: {still}"]
        files = [(out / f"{name}.csv").read_text().splitlines() for name in ("geometry", "bands", "pairs")]
        tables[batch] = [row for lines in files for row in csv.DictReader(lines)]
    for batch in (2, 5):
        for one, other in zip(tables[1], tables[batch], strict=True):
            for key, value in one.items():
                if value != other[key]:
                    assert float(other[key]) == pytest.approx(float(value), rel=1e-8, abs=1e-11), (one, key)


def test_batches_hold_one_shape_and_respect_a_budget(monkeypatch):
    shapes = {f"{m}{i}": shape for i in range(6) for m, shape in (("q", (64, 64)), ("k", (16, 64)), ("up", (640, 64)))}
    options = {"updates": 2, "dtype": torch.float64, "device": "cpu"}
    one = matrix_bytes((640, 64), 2, torch.float64)
    monkeypatch.setattr(batches_module, "CPU_BYTES", 2 * one)
    cut = list(batches(shapes, **options))
    assert sorted(name for names in cut for name in names) == sorted(shapes)
    for names in cut:
        assert len({shapes[name] for name in names}) == 1
        assert len(names) == 1 or sum(matrix_bytes(shapes[name], 2, torch.float64) for name in names) <= 2 * one
    assert [names for names in cut if names[0].startswith("up")] == [["up0", "up1"], ["up2", "up3"], ["up4", "up5"]]
    assert max(map(len, cut)) == 6
    assert {len(names) for names in batches(shapes, **options, batch=5)} == {5, 1}
    monkeypatch.setattr(batches_module, "CPU_BYTES", 1)
    assert {len(names) for names in batches(shapes, **options)} == {1}


def test_what_torch_keeps_of_freed_tensors_is_room_for_batches(monkeypatch):
    told = {"mem_get_info": (20, 100), "memory_reserved": 70, "memory_allocated": 10}
    for name, value in told.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    assert batches_module.free_bytes("cuda:1") == int(batches_module.GPU_SHARE * 80)


def test_bands_suite_and_pairs_of_noise_and_of_a_rotation(family, base):
    """Two runs of one recipe share half of their rotation; noise shares nothing and lies evenly over the bands."""
    base = {name: W.bfloat16() for name, W in base.items()}
    turned = {
        i: family.matrices(base, lambda W, j, i=i: rotated(rotated(W, j), j + 100 * i).bfloat16()) for i in (1, 2)
    }
    noisy = {name: W.bfloat16() for name, W in family.moved(base, 1, 0.02).items()}
    found = run(family, base, {"first": turned[1], "second": turned[2], "noisy": noisy}, planted=[])

    bands = {(row["expert"], row["side"], row["start"]): row for row in found["bands"]}
    assert len(bands) == 3 * 2 * 3
    for start in (0, 0.1, 0.9):
        assert bands["first", "left", start]["kappa"] > 0.9
        assert abs(bands["noisy", "left", start]["kappa"]) < 0.2
        assert bands["noisy", "right", start]["energy_ratio"] == pytest.approx(1, abs=0.2)
        assert bands["noisy", "right", start]["angle_ratio"] == pytest.approx(1, abs=0.2)  # bands of 1 to 19
    with (family.folder / "out" / "bands.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = [r for r in rows if (r["expert"], r["tensor"], r["side"]) == ("noisy", rows[0]["tensor"], "left")]
    bands = [r for r in first if (r["start"], r["stop"]) in (("0", "0.1"), ("0.1", "0.9"), ("0.9", "1"))]
    assert sum(float(r["energy"]) for r in bands) == pytest.approx(1)
    assert len(first) == 3 + 8

    suite = {(row["expert"], row["measure"]): row for row in found["suite"]}
    assert suite["first", "nss"]["ratio"] < 0.2
    for measure in ("nss", "angle_mean_left", "low_overlap", "principal_overlap", "unchanged_bf16"):
        assert suite["noisy", measure]["ratio"] == pytest.approx(1, abs=0.1), measure
    assert (
        suite["noisy", "low_overlap"]["update"] > 1.01
    )  # of 1.02 at most: finer steps of small numbers, by noise alone

    pairs = {(row["a"], row["b"]): row for row in found["pairs"]}
    assert list(pairs) == [("first", "second"), ("first", "noisy"), ("second", "noisy")]
    alike, apart = pairs["first", "second"], pairs["first", "noisy"]
    assert alike["cosine"] == pytest.approx(0.5, abs=0.1)
    assert alike["generators"] == pytest.approx(0.5, abs=0.1)
    assert abs(apart["cosine"]) < 4 * apart["cosine_spread"]
    assert apart["jaccard"] == pytest.approx(apart["jaccard_noise"], abs=0.05)
    assert apart["commutator"] == pytest.approx(apart["commutator_null"], rel=0.1)


def test_rows_of_other_settings_are_not_taken_over(family, base):
    experts, out = {"noisy": family.save("noisy", family.moved(base, 1))}, family.folder / "out"
    opened = family.save("base", base)

    def killed(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        geometry(opened, experts, out, seed=1, progress=killed)
    geometry(opened, experts, out)
    geometry(opened, experts, family.folder / "whole")
    assert (out / "geometry.csv").read_bytes() == (family.folder / "whole" / "geometry.csv").read_bytes()


def test_float32_gives_the_numbers_of_float64(family, base):
    experts = {"noisy": family.moved(base, 1, 1e-3)}
    exact = run(family, base, experts, controls=[], planted=[])
    low = geometry(
        open_checkpoint(family.folder / "base"),
        {"noisy": open_checkpoint(family.folder / "noisy")},
        family.folder / "low",
        dtype="float32",
        controls=[],
        planted=[],
    )
    for a, b in zip(exact["rows"], low["rows"], strict=True):
        for key in ("kappa_median", "share_median", "null_median", "nu_median", "rho_median", "gram_median"):
            assert b[key] == pytest.approx(a[key], abs=2e-3), key


def test_unmoved_matrices_are_told_and_do_not_count(family, base):
    moved = family.matrices(base, rotated)
    still = "model.layers.1.mlp.up_proj.weight"
    found = run(family, base, {"turned": moved | {still: base[still]}, "same": base}, controls=[], planted=[])
    assert f"turned: {still}" in found["unmoved"]
    assert len(found["unmoved"]) == 29
    row = next(row for row in table(family) if row["tensor"] == still)
    assert (row["kappa"], row["unchanged_bf16"], row["rel_norm"]) == ("", "1", "0")
    assert found["experts"]["same"]["words"] == "same: no matrix differs from the base"
    assert found["experts"]["turned"]["verdict"] == "rotation"
    assert "planted" not in found["experts"]["turned"]["words"]


def test_a_rotation_that_the_reference_shows_too_is_not_special_to_rl(family, base):
    experts = {"rl": family.matrices(base, rotated), "sft": family.matrices(base, lambda W, i: rotated(W, i + 50))}
    found = run(family, base, experts, references=["sft"], controls=[])
    assert found["verdict"] == "Rotation in rl. It shows in sft as well: it is not special to RL."


def test_a_rotation_in_one_module_type_is_not_lost_in_the_pool(family, base):
    noisy = family.moved(base, 1, 0.02)
    part = {name: rotated(W, i) for i, (name, W) in enumerate(base.items()) if "o_proj" in name}
    found = run(family, base, {"rl": noisy | part}, controls=[], planted=[])
    assert found["experts"]["rl"]["verdict"] == "rotation"
    assert found["experts"]["rl"]["modules"] == ["o"]
    assert "a rotation in o alone" in found["experts"]["rl"]["words"]
    assert found["verdict"].startswith("Rotation in rl (o alone).")


def test_overall_verdict_in_words():
    def told(references=(), **verdicts):
        found = {name: {"verdict": verdict, "modules": []} for name, verdict in verdicts.items()}
        return overall_verdict(found, references)

    assert "nothing here is special to RL" in told(["sft"], math="none", code="stretch", sft="stretch")
    assert told(math="stretch", code="none").startswith("No rotation: the updates of math and code")
    assert told(["sft"], math="undecided", sft="undecided").startswith("Undecided: math undecided")
    assert "is open" in told(math="rotation")
    assert "The references do not show it: sft none" in told(["sft"], math="rotation", sft="none")


@pytest.mark.parametrize(
    ("median", "low", "high", "verdict"),
    [
        (0.6, 0.4, 0.8, "rotation"),
        (0.01, -0.04, 0.04, "none"),
        (0.01, -0.06, 0.04, "undecided"),
        (0.2, 0.15, 0.25, "undecided"),
        (-0.3, -0.4, -0.2, "stretch"),
        (0.0, np.nan, np.nan, "undecided"),
    ],
)
def test_thresholds(median, low, high, verdict):
    assert judge(median, low, high, Thresholds()) == verdict


def test_bootstrap_over_layers_covers_the_median():
    """Layers as clusters: 95 % intervals for 28 layers of one matrix hold the true median about 95 times of 100."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_median(rng.normal(0.3, 0.1, (28, 1)), 200, 0)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 200
    clustered = np.repeat(rng.normal(0.3, 0.1, (28, 1)), 7, axis=1)
    assert bootstrap_median(clustered, 500, 0) == bootstrap_median(clustered[:, :1], 500, 0)
    assert np.isnan(bootstrap_median(clustered[:1], 500, 0)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": ["shuffle"]}, "unknown control 'shuffle'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', one of float64, float32 is expected"),
        ({"planted": [0.1, 3]}, r"planted.1 is 3, it must lie in \[0, 1\]"),
        ({"principal": 0}, r"principal is 0, it must lie in \(0, 1\]"),
        ({"bands": [0.9, 0.1]}, r"\[0.9, 0.1\] are no rising edges"),
        ({"batch": 0}, "batch is 0, it must be 1 or more"),
        ({"device": "cuda:7"}, "'cuda:7' is not here; choose auto or cpu"),
        ({"references": ["sft"]}, "no model 'sft'; one of: noisy"),
    ],
)
def test_wrong_settings_are_one_line(family, base, options, message):
    with pytest.raises(ConfigError, match=message):
        run(family, base, {"noisy": family.moved(base, 1)}, **options)
    assert not (family.folder / "out").exists()


def test_a_model_without_known_matrices_is_refused(family):
    opened = family.save("gpt", {"mixer.weight": torch.randn(4, 4)})
    with pytest.raises(CheckpointError, match="no tensor is named like a matrix"):
        geometry(opened, {"tuned": opened}, family.folder / "out")


@pytest.mark.parametrize("choice", ["none", "lineage", "geometry", "fast"])
def test_presets_compose_and_bind(choice):
    from hydra.utils import instantiate

    preset = compose([f"evidence={choice}"]).evidence
    assert preset.lineage is (choice != "none")
    if choice in ("geometry", "fast"):
        stage = instantiate(preset.geometry)
        assert stage.func is geometry
        assert list(stage.keywords["controls"]) == (list(CONTROLS) if choice == "geometry" else [])
        assert stage.keywords["dtype"] == ("float64" if choice == "geometry" else "float32")
    else:
        assert preset.geometry is None
