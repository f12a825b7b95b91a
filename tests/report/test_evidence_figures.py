"""The evidence's figures from tables as the stages write them."""

import csv
import xml.etree.ElementTree as ET

import pytest

from rotrl.evidence.bands import COLUMNS as BANDS
from rotrl.evidence.function import COLUMNS as FUNCTION
from rotrl.report import figures

SHOWN = {"tangent": 0.7, "rotation": 0.7, "complement": 0.9, "scaled": 0.9, "plane": 0.65, "part": 0.6, "random": 0.0}
RESTORED = {"ranks_0-20": 0.5, "ranks_0-20_control": 0.6, "layers_75-100": 0.9, "layers_75-100_control": 0.4}


def texts(svg):
    return {"".join(node.itertext()).strip() for node in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")}


def write(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def drawn(evidence_only):
    """The record's run folder with bands.csv and function.csv."""
    record, folder = evidence_only
    with (folder / "evidence" / "geometry.csv").open() as file:
        matrices = [row for row in csv.DictReader(file) if not row["control"]]
    about = ("expert", "tensor", "layer", "module", "side")
    bands = [
        {key: row[key] for key in about}
        | {"start": i / 10, "stop": (i + 1) / 10, "angle": 1 + i / 5, "angle_noise": 1 + i / 3}
        for row in matrices
        for i in range(10)
    ]
    write(folder / "evidence" / "bands.csv", BANDS, bands)
    doses = {
        f"{kind}_{t:g}": t * (1.0 if kind == "update" else 0.6) for t in (0.5, 1.0) for kind in ("update", "rotation")
    }
    rows = [
        {"expert": expert, "part": part, "energy": 0.2, "kl": 0.1, "score": score, "low": score - 0.02, "high": score}
        for expert in ("math", "code")
        for part, score in (SHOWN | RESTORED | doses).items()
    ]
    write(folder / "evidence" / "function.csv", FUNCTION, rows)
    return record, folder


def test_all_figures_of_the_evidence_are_drawn_with_their_units(drawn):
    record, folder = drawn
    names = {path.stem for path in figures.draw(record, folder)}
    assert names >= {
        "share_vs_null",
        "kappa_by_layer",
        "calibration",
        "angle_spectra",
        "parts",
        "dose_response",
        "restored",
    }
    shown = {name: texts(folder / "figures" / f"{name}.svg") for name in names}
    assert {"angle, degrees", "singular directions, %", "q, left", "gate, right", "noise of the same norm"} <= shown[
        "angle_spectra"
    ]
    assert {"kappa", "rotation planted, % of the update's energy", "math"} <= shown["calibration"]
    assert {"energy of the part, % of the update's", "random directions of its planes", "code"} <= shown["parts"]
    assert {"dose t, share of update or angles", "KL gap to the expert closed, %"} <= shown["dose_response"]
    assert "as much energy taken out anywhere" in shown["restored"]


def test_fused_matrices_are_drawn_by_their_names(drawn):
    """Phi-3 stores q, k and v as one matrix, gate and up as another."""
    record, folder = drawn
    for name in ("geometry", "bands"):
        path = folder / "evidence" / f"{name}.csv"
        path.write_text(path.read_text().replace(",q,", ",qkv,").replace(",gate,", ",gate_up,"))
    figures.draw(record, folder)
    shown = {name: texts(folder / "figures" / f"{name}.svg") for name in ("kappa_by_layer", "angle_spectra")}
    assert {"qkv", "gate_up", "down"} <= shown["kappa_by_layer"]
    assert {"qkv, left", "gate_up, right"} <= shown["angle_spectra"]


def test_no_formula_reaches_a_reader(drawn):
    """Tick labels of logarithmic axes are plain numbers."""
    record, folder = drawn
    figures.draw(record, folder)
    assert not any("math" in text and "$" in text for text in texts(folder / "figures" / "angle_spectra.svg"))


def test_a_row_without_an_interval_is_a_mark_alone(drawn):
    record, folder = drawn
    rows = [{"expert": "math", "part": "tangent", "energy": 0.2, "score": 0.5}]
    write(folder / "evidence" / "function.csv", FUNCTION, rows)
    names = {path.stem for path in figures.draw(record, folder)}
    assert "parts" in names
    assert "dose_response" not in names
