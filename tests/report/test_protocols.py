"""One set of models under several protocols."""

import copy
import csv
import io

import pytest
from rich.console import Console

from rotrl.report.protocols import COLUMNS, labels, protocol_rows
from rotrl.report.sweep_page import render_sweep
from rotrl.report.sweep_table import sweep_table


@pytest.fixture
def jobs(full):
    """Two jobs without merges; the second protocol costs every score five points."""
    found = []
    for name, change in (("deepscaler", 0.0), ("transferability", -0.05)):
        record = copy.deepcopy(full[0]) | {"merges": {}}
        record["config"] = {"protocol": {"name": name, "n": 8}}
        record["scores"] = [row for row in record["scores"] if row["model"] in ("base", "math")]
        for row in record["scores"]:
            for key in ("value", "low", "high", "sampling_low", "sampling_high"):
                row[key] += change
        found.append(record)
    band = {"model": "math", "task": "tiny_math", "words": "within the published 80 to 82"}
    found[0]["published"] = [band]
    return found


def test_rows_of_a_task_stand_together_with_the_difference_to_the_first_protocol(jobs):
    rows = protocol_rows(jobs)
    assert [(row["model"], row["task"], row["protocol"]) for row in rows[:2]] == [
        ("base", "tiny_math", "deepscaler"),
        ("base", "tiny_math", "transferability"),
    ]
    assert rows[0]["difference"] is None
    assert rows[1]["difference"] == pytest.approx(-0.05)
    half = rows[0]["sampling_high"] - rows[0]["value"]
    assert rows[1]["difference_high"] == pytest.approx(-0.05 + half * 2**0.5)  # two equal errors that are independent
    assert {row["metric"] for row in rows} == {"avg@8"}
    assert len(rows) == 8


def test_protocols_of_one_name_are_told_apart_and_one_protocol_is_no_comparison(jobs):
    jobs[1]["config"]["protocol"] = {"name": "deepscaler", "n": 4}
    assert labels(jobs) == ["deepscaler n=8", "deepscaler n=4"]
    jobs[1]["config"]["protocol"]["n"] = 8
    assert protocol_rows(jobs) == []


def test_page_file_and_terminal_show_them(jobs, tmp_path):
    page = render_sweep(jobs, tmp_path)
    assert page is not None
    text = page.read_text()
    assert "against deepscaler" in text
    assert "within the published 80 to 82" in text
    assert "hunter2" not in text
    with (tmp_path / "protocols.csv").open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    out = io.StringIO()
    sweep_table(jobs, Console(width=120, file=out))
    row = next(line for line in out.getvalue().splitlines() if "transferability" in line)
    assert "−5.0" in row
    assert render_sweep(jobs[:1], tmp_path) is None
