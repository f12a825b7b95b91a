"""What a report says of an alignment alone: sentences, kinds of matrices, and every matrix over depth."""

import csv
import math

import pytest

from rotrl.align.results import COLUMNS
from rotrl.report import figures, html
from rotrl.report.alignment import by_module, matrices, sentences
from tests.report.conftest import skeleton

MODULES = {"q": "right", "k": "left", "down": "left"}


def write(folder, *, rotated=True):
    rows = [
        (
            f"layers.{layer}.{module}",
            layer,
            module,
            side if rotated else "",
            1.0 + layer,
            5.0 + layer,
            0.1 * layer,
            0.02,
        )
        for layer in range(3)
        for module, side in MODULES.items()
    ]
    if not rotated:
        rows = [(*row[:4], None, None, *row[6:]) for row in rows]
    with (folder / "align.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def test_kinds_of_matrices(tmp_path):
    write(tmp_path)
    q, k, down = by_module(matrices(tmp_path))
    assert [row["module"] for row in (q, k, down)] == ["q", "k", "down"]
    assert (q["side"], k["side"], q["matrices"]) == ("right", "left", 3)
    assert q["angle_rms"] == pytest.approx(math.sqrt((1 + 4 + 9) / 3))
    assert q["angle_max"] == 7.0
    assert q["explained"] == pytest.approx(0.1)
    write(tmp_path, rotated=False)
    assert by_module(matrices(tmp_path))[0]["angle_rms"] is None
    assert by_module(matrices(tmp_path / "absent")) == []


def test_sentences():
    align = {"kl_before": {"math": 0.2, "code": 0.1}, "kl_after": {"math": 0.05, "code": 0.11}, "change": 0.0123}
    align |= {"explained": -0.1, "closed_form": 0.176}
    align["controls"] = {
        "lora": {"kl_after": {"math": 0.04, "code": 0.1}, "parametrization": "lora", "parameters": 1099}
    }
    near, far, control = sentences(align)
    assert "math 0.2000 before, 0.0500 after (−75.0 %); code 0.1000 before, 0.1100 after (+10.0 %)" in near
    assert "went 1.23 % of their length and removed −10.0 % of the squared distance to the mean of the teachers" in far
    assert "the nearest rotations (Procrustes) remove 17.6 %" in far
    assert control == "Control lora, the same fit by lora (1,099 parameters), ends at math 0.0400, code 0.1000."
    assert sentences({}) == []
    assert len(sentences({"explained": 0.3, "kl_after": {}})) == 1


@pytest.mark.parametrize("rotated", [True, False])
def test_the_page_of_an_alignment_alone(merge_only, rotated):
    record, folder = merge_only
    record |= {"merges": {}, "align": skeleton()["align"]}
    write(folder, rotated=rotated)
    assert {path.stem for path in figures.draw(record, folder)} == {"alignment", "alignment_by_layer"}
    svg = (folder / "figures" / "alignment_by_layer.svg").read_text()
    assert ("rms angle, degrees" if rotated else "change of the weights, %") in svg
    page = html.render(record, folder).read_text()
    assert "KL from each teacher" in page
    assert page.count("<tr><td>down</td>") == 1
