"""What a swept number does: seeds averaged, weights that it does not change in one place, pairs by job."""

import copy
import html
import io
import json
import re

import pytest
from rich.console import Console

from rotrl.report.curves import COLUMNS, DIFFERENCES, curves, swept_number
from rotrl.report.sweep_page import render_sweep
from rotrl.report.sweep_table import sweep_table

LEARNED = {"_target_": "rotrl.merge.rotation.learned"}


def job(record, prompts, seed):
    """The record with two learned merges, which gain 2 points from more prompts and lose `seed` points; ties stays."""
    found = copy.deepcopy(record)
    found["config"] = {"name": "demo", "seed": seed, "align": {"prompts": prompts}}
    kept = ("base", "math", "code", "ties", "learned", "tsv_m")
    change = (0.02 if prompts == 32 else 0.0) - 0.01 * seed
    found["scores"] = [row for row in found["scores"] if row["model"] in kept]
    found["merges"] = {name: dict(found["merges"][name]) for name in kept[3:]}
    for name in ("learned", "tsv_m"):
        found["merges"][name] |= {"sha256": f"{name} {prompts} {seed}", "config": LEARNED, "rotates": name == "learned"}
    found["merges"]["ties"]["sha256"] = f"ties {seed}"
    for row in found["scores"]:
        if row["model"] in ("learned", "tsv_m"):
            for key in ("value", "low", "high"):
                row[key] += change
    against_ties = {"a": "learned", "b": "ties", "task": "mean", "difference": 0.05 + change}
    against_tsv_m = {"a": "tsv_m", "b": "learned", "task": "mean", "difference": -0.01}
    pairs = [
        {**row, "low": row["difference"] - 0.02, "high": row["difference"] + 0.02}
        for row in (against_ties, against_tsv_m)
    ]
    found["comparisons"] = pairs
    return found


@pytest.fixture
def records(full):
    return [job(full[0], prompts, seed) for prompts in (8, 32) for seed in (0, 1)]


def cell(found, model, value):
    return next(row for row in found["rows"] if (row["model"], row["value"]) == (model, value))


def test_seeds_are_averaged_with_their_intervals_and_extremes(records, full):
    found = curves(records)
    assert (found["key"], found["values"]) == ("align.prompts", ["8", "32"])
    few, many = cell(found, "learned", "8"), cell(found, "learned", "32")
    assert few["jobs"] == 2
    assert many["mean"] - few["mean"] == pytest.approx(0.02)
    assert few["highest"] - few["lowest"] == pytest.approx(0.01)
    assert few["mean"] == pytest.approx((few["lowest"] + few["highest"]) / 2)
    alone = curves([record for record in records if record["config"]["seed"] == 0])
    width = [row["high"] - row["low"] for row in (few, cell(alone, "learned", "8"))]
    assert width[0] == pytest.approx(width[1])  # no narrower for seeds that share their problems
    assert set(COLUMNS) == set(few)


def test_rows_go_by_value_whatever_the_order_of_the_jobs(records):
    assert curves(records[::-1])["rows"] == curves(records)["rows"]


def test_what_the_number_does_not_change_stands_once(records):
    found = curves(records)
    places = {(row["model"], row["value"]) for row in found["rows"]}
    assert {("base", ""), ("math", ""), ("ties", ""), ("learned", "8"), ("learned", "32")} <= places
    assert ("ties", "8") not in places
    assert cell(found, "ties", "")["jobs"] == 2
    assert found["tried"] == 5  # learned and tsv_m at two values, ties


def test_equal_weights_with_other_scores_are_not_the_same(records):
    """As where the problems are swept and not the merge."""
    for record in records[2:]:
        for row in record["scores"]:
            for key in ("value", "low", "high"):
                row[key] -= 0.1 * (row["model"] == "ties")
    found = curves(records)
    assert cell(found, "ties", "8")["mean"] - cell(found, "ties", "32")["mean"] == pytest.approx(0.1)
    assert cell(found, "math", "")["jobs"] == 2


def test_experts_of_one_name_and_other_weights_are_not_averaged(records):
    given = [copy.deepcopy(record) for record in (records[0], records[0], records[2], records[2])]
    for record, folder in zip(given, ("A", "B") * 2, strict=True):
        record["config"]["models"] = {"experts": {"math": folder}}
        record["models"]["experts"]["math"]["sha256"] = folder
        for row in record["scores"]:
            for key in ("value", "low", "high"):
                row[key] -= 0.1 * (row["model"] == "math" and folder == "B")
    found = curves(given)
    first, second = (cell(found, f"math models.experts.math={folder}", "") for folder in ("A", "B"))
    assert first["mean"] - second["mean"] == pytest.approx(0.1)
    assert first["jobs"] == second["jobs"] == cell(found, "code", "")["jobs"] == 1


def test_one_job_for_each_merge_is_not_one_for_each_seed(records):
    """Base and experts stand in every job: where their scores go with the value they are one model at each."""
    given = [copy.deepcopy(record) for record in (records[0], records[0], records[2], records[2])]
    for record in given[2:]:
        for row in record["scores"]:
            for key in ("value", "low", "high"):
                row[key] -= 0.1 * (row["model"] in ("base", "math"))
    for record, merge in zip(given, ("learned", "ties") * 2, strict=True):
        record["scores"] = [row for row in record["scores"] if row["model"] in ("base", "math", "code", merge)]
    found = curves(given)
    assert cell(found, "base", "8")["mean"] - cell(found, "base", "32")["mean"] == pytest.approx(0.1)
    assert [row["jobs"] for row in found["rows"]] == [1] * len(found["rows"])


def test_rotations_are_compared_with_every_other_merge_in_the_same_job(records):
    found = curves(records)["differences"]
    assert {row["a"] for row in found} == {"learned"}
    assert {row["b"] for row in found} == {"ties", "tsv_m"}
    by_place = {(row["b"], row["value"]): (row["difference"], row["low"], row["high"]) for row in found}
    assert by_place["ties", "8"] == pytest.approx((0.045, 0.025, 0.065))
    assert by_place["ties", "32"] == pytest.approx((0.065, 0.045, 0.085))
    assert by_place["tsv_m", "8"] == by_place["tsv_m", "32"] == pytest.approx((0.01, -0.01, 0.03))
    assert set(DIFFERENCES) == set(found[0])


def test_only_numbers_are_swept_numbers():
    given = [{"merge._target_": "a", "seed": "0", "align.prompts": "8"}, {"merge._target_": "b", "seed": "1"}]
    given[1]["align.prompts"] = "None"
    assert swept_number(given) is None  # one number and no limit: two values, but one number
    assert swept_number([{"align.prompts": "8"}, {"align.prompts": "32"}, {"align.prompts": "None"}]) == "align.prompts"
    assert swept_number([]) is None


@pytest.mark.parametrize(("width", "shown"), [(80, "+4.5 ±2.0"), (60, "+4.5 ±2.0"), (120, "+4.5 (+2.5 to +6.5)")])
def test_names_of_merges_are_kept_in_a_narrow_terminal(width, shown, records):
    four = [*records, *(copy.deepcopy(record) for record in records)]
    for record, prompts in zip(four[4:], (128, 128, None, None), strict=True):
        record["config"]["align"]["prompts"] = prompts
    out = io.StringIO()
    sweep_table(four, Console(width=width, file=out))
    line = next(line for line in reversed(out.getvalue().splitlines()) if line.startswith("ties "))
    assert shown in line
    assert "no limit" in out.getvalue()


def test_page_tables_and_figure(records, tmp_path):
    folder = tmp_path / "multirun"
    folder.mkdir()
    for number, record in enumerate(records):
        record["job"] = number + 1  # job 0 was refused and left no record
    page = render_sweep(records, folder)
    assert page is not None
    text = page.read_text()
    assert "Learned rotations minus other merges" in text
    assert 'href="4/report.html"' in text
    assert 'href="0/report.html"' not in text
    assert 'id="curves"' in text
    config = json.loads(html.unescape(re.findall(r"<pre[^>]*>(\{.*?\})</pre>", text, re.DOTALL)[-1]))
    assert list(config) == ["1", "2", "3", "4"]
    assert (folder / "curves.csv").read_text().count("\n") == 1 + len(curves(records)["rows"])
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["curves.png", "curves.svg"]


def test_the_page_of_an_earlier_multirun_goes(records, tmp_path):
    folder = tmp_path / "multirun"
    folder.mkdir()
    (folder / "notes.txt").touch()
    assert render_sweep(records, folder) is not None
    assert render_sweep(records[:1], folder) is None
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "curves.csv").touch()  # of the user: no page stands beside it
    assert render_sweep([], folder) is None
    assert (folder / "curves.csv").exists()
