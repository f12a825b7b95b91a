import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from rotrl.report import figures
from rotrl.report.labels import place


def texts(svg):
    return ["".join(node.itertext()).strip() for node in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_demo_draws_every_figure_the_same_every_time(full):
    record, run_dir = full
    written = figures.draw(record, run_dir)
    names = {path.stem for path in written}
    assert names == {"share_vs_null", "kappa_by_layer", "calibration", "alignment", "tasks_scatter"}
    assert all((run_dir / "figures" / f"{name}.{kind}").is_file() for name in names for kind in ("svg", "png"))
    first = {path.name: path.read_bytes() for path in written}
    figures.draw(record, run_dir)
    assert {path.name: path.read_bytes() for path in written} == first
    shown = texts(run_dir / "figures" / "tasks_scatter.svg")
    for model in {row["model"] for row in record["scores"]}:
        assert model in shown
    assert b"<dc:date>" not in first["share_vs_null.svg"]


def test_every_matrix_expert_and_side_has_a_mark(evidence_only):
    record, run_dir = evidence_only
    figures.draw(record, run_dir)
    svg = (run_dir / "figures" / "share_vs_null.svg").read_text()
    marks = {colour: len(re.findall(rf"<use [^>]*stroke: {colour}", svg)) for colour in ("#0072b2", "#d55e00")}
    assert marks == dict.fromkeys(marks, 2 * 3 * 7)  # sides, layers, modules
    assert {"controls", "planted rotation", "q, o"} <= set(texts(run_dir / "figures" / "share_vs_null.svg"))


@pytest.mark.parametrize("tasks", [1, 3])
def test_one_task_or_many_are_a_dot_plot(full, tasks):
    record, run_dir = full
    rows = [row for row in record["scores"] if row["task"] == "tiny_math"]
    record["scores"] = [row | {"task": f"task{i}"} for i in range(tasks) for row in rows]
    names = {path.stem for path in figures.draw(record, run_dir)}
    assert "task_means" in names
    assert "tasks_scatter" not in names


def test_nothing_to_draw_draws_nothing(merge_only):
    record, run_dir = merge_only
    assert figures.draw(record, run_dir) == []
    assert not (run_dir / "figures").exists()


def test_names_are_text_and_not_formulas(full):
    record, run_dir = full
    record["scores"] = [row | {"model": row["model"].replace("ties", "$t^2$ <b>")} for row in record["scores"]]
    figures.draw(record, run_dir)
    assert "$t^2$ <b>" in texts(run_dir / "figures" / "tasks_scatter.svg")


def test_scores_without_intervals_are_drawn_without_bars(full):
    record, run_dir = full
    record["scores"] = [row | {"low": None, "high": None} for row in record["scores"]]
    assert "tasks_scatter" in {path.stem for path in figures.draw(record, run_dir)}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spread", [25.0, 200.0])
def test_labels_cover_neither_each_other_nor_a_point(seed, spread):
    rng = np.random.default_rng(seed)
    points = np.clip(rng.normal([400, 300], spread, (13, 2)), 120, [680, 480])
    sizes = np.stack([rng.uniform(40, 130, 13), np.full(13, 14.0)], -1)
    centres = place(points, sizes, (0, 0, 800, 600))
    low, high = centres - sizes / 2, centres + sizes / 2
    assert (low >= 0).all()
    assert (high <= [800, 600]).all()
    for i in range(13):
        assert not ((points > low[i]) & (points < high[i])).all(-1).any()
        for j in range(i):
            assert ((low[i] >= high[j]) | (low[j] >= high[i])).any()
