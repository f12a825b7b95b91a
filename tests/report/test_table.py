import copy
import io

import pytest
from rich.console import Console

from rotrl.report import table
from rotrl.report.standings import standings
from rotrl.report.sweep import as_one_record, swept_keys
from rotrl.report.sweep_table import sweep_table


def printed(show, *arguments, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    console = Console(width=width, file=io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    show(*arguments, console)
    return raw.getvalue().decode(encoding)


def test_the_demo_fits_eighty_columns_and_marks_the_best(full):
    text = printed(table.show, full[0])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    best = next(line for line in lines if line.startswith("learned ★◆"))
    assert best.count("±") == 3
    assert "…" not in text
    order = [line.split()[0] for line in lines if "±" in line]
    assert order[:4] == ["base", "math", "code", "learned"]
    assert len(order) == 13
    assert "10 merges were tried" in text


def test_a_wide_terminal_gets_whole_intervals(full):
    text = printed(table.show, full[0], width=160)
    row = next(line for line in text.splitlines() if line.startswith("learned"))
    assert row.count(" to ") == 4
    assert "±" not in text


def test_a_terminal_without_unicode_is_no_error(full):
    text = printed(table.show, full[0], encoding="ascii")
    assert "learned *#" in text


def test_no_secret_is_shown(full):
    record, _ = full
    record["warnings"].append("logger.api_key=hunter2hunter2 was refused")
    assert "hunter2" not in printed(table.show, record)


def test_evidence_alone_shows_each_share_beside_its_null(evidence_only):
    text = printed(table.show, evidence_only[0])
    assert "siblings" in text
    row = next(line for line in text.splitlines() if line.startswith("q left"))
    assert row.count("(") == 3
    assert "avg@n" not in text


@pytest.mark.parametrize(("models", "width", "brackets"), [(2, 90, 4), (2, 80, 2), (4, 76, 0)])
def test_where_there_is_no_room_references_and_then_all_show_kappa_alone(evidence_only, models, width, brackets):
    """Every model keeps its kappa, and every row the name of its matrix."""
    record = copy.deepcopy(evidence_only[0])
    rows = [row for row in record["geometry"]["rows"] if row["expert"] == "math"]
    names = [f"{kind}_{i}" for i in range(models) for kind in ("rl", "sft")]
    record["geometry"]["rows"] = [row | {"expert": name} for name in names for row in rows]
    record["geometry"]["references"] = [name for name in names if name.startswith("sft")]
    text = printed(table.show, record, width=width)
    row = next(line for line in text.splitlines() if line.startswith("q left"))
    assert row.count("(") == brackets
    assert len(row.replace("+", " ").replace("−", " ").split()) == 2 + 2 * models + 2 * brackets
    assert "…" not in row


def test_a_merge_alone_shows_what_was_written(merge_only):
    text = printed(table.show, merge_only[0])
    assert "merged/ties" in text
    assert "0.65" in text


def test_a_failed_run_says_why(failed):
    text = printed(table.show, failed[0])
    assert text.startswith("failed  the engine died twice")


@pytest.mark.parametrize("tasks", [1, 4])
def test_other_numbers_of_tasks(full, tasks):
    record, _ = full
    rows = [row for row in record["scores"] if row["task"] == "tiny_math"]
    record["scores"] = [row | {"task": f"task{i}"} for i in range(tasks) for row in rows]
    text = printed(table.show, record, width=120)
    assert ("  min" in text.split("\nbase")[0]) == (tasks > 1)
    assert "learned" in text


def jobs(record, choices):
    """Records of a multirun: one merge each, base and experts in all."""
    found = []
    for merge, scale in choices:
        job = copy.deepcopy(record)
        method = {"_target_": f"rotrl.merge.linear.{merge}", "scale": scale}
        job["config"] = {"name": "demo", "merge_scale": scale, "merge": method, "run_dir": f"multirun/{merge}{scale}"}
        job["merges"] = {merge: {**record["merges"][merge], "config": method}}
        others = ("base", "math", "code", merge)
        job["scores"] = [row for row in record["scores"] if row["model"] in others]
        job["comparisons"] = [row for row in record["comparisons"] if row["a"] == merge]
        found.append(job)
    return found


def test_a_multirun_is_one_table_over_all_jobs(full):
    records = jobs(full[0], [("ties", 0.5), ("linear", 0.5), ("slerp", 0.5)])
    records[2] |= {"status": "failed", "error": "the engine died", "scores": [], "merges": {}, "comparisons": []}
    text = printed(sweep_table, records, width=100)
    assert text.count("\nbase") == text.count("\nmath") == text.count("\nties") == text.count("\nlinear") == 1
    assert "2 merges were tried" in text
    assert "job 2 failed: the engine died" in text


def test_a_number_that_is_swept_is_a_column_for_each_value(full):
    records = jobs(full[0], [("ties", 0.5), ("ties", 1.0), ("linear", 0.5), ("linear", 1.0)])
    for record in records:
        record["merges"][next(iter(record["merges"]))]["sha256"] = str(record["config"]["merge_scale"])
    records[3] |= {"status": "failed", "error": "the engine died", "scores": [], "merges": {}, "comparisons": []}
    text = printed(sweep_table, records, width=100)
    heads = next(line for line in text.splitlines() if line.startswith("model"))
    assert heads.split() == ["model", "at", "any", "0.5", "1.0"]
    assert text.count("±") == 3 + 3 + 0  # base and experts at any scale, ties at two, linear at one
    assert "job 3 (merge_scale=1.0) failed: the engine died" in text


def test_a_multirun_of_merges_alone(merge_only):
    record, _ = merge_only
    text = printed(sweep_table, [record, copy.deepcopy(record)], width=100)
    assert "ties job 1" in text


def test_swept_keys_name_what_differs_once(full):
    records = jobs(full[0], [("ties", 0.5), ("linear", 1.0)])
    assert swept_keys(records) == ["merge_scale=0.5", "merge_scale=1.0"]
    assert swept_keys(records[:1]) == [""]
    assert swept_keys([]) == []


def test_what_follows_from_the_method_is_not_named_beside_it(full):
    records = jobs(full[0], [("ties", 0.5), ("linear", 0.5)])
    for record, scope in zip(records, ("matrices", "all"), strict=True):
        record["config"]["merge"]["scope"] = scope
    assert swept_keys(records) == ["", ""]


def test_jobs_of_other_tasks_keep_the_scores_of_base_and_experts(full):
    records = jobs(full[0], [("ties", 0.5), ("ties", 0.5)])
    for record, task in zip(records, ("tiny_math", "tiny_code"), strict=True):
        for kind in ("scores", "comparisons"):
            record[kind] = [row for row in record[kind] if row["task"] in (task, "mean")]
    joined, _ = as_one_record(records)
    tasks = {(row["model"], row["task"]) for row in joined["scores"]}
    merges = {("ties", "tiny_math"), ("ties job 1", "tiny_code")}
    assert tasks == {(name, task) for name in ("base", "math", "code") for task in ("tiny_math", "tiny_code")} | merges
    assert "mean" not in {row["task"] for row in joined["comparisons"]}  # over other tasks in each job
    assert all(row.mean for row in standings(joined).rows if row.role != "merge")


def test_other_experts_of_one_name_stand_apart_with_what_is_measured_against_them(full):
    records = jobs(full[0], [("ties", 0.5), ("ties", 0.5), ("linear", 0.5)])
    for record, folder in zip(records, ("A", "B", "B"), strict=True):
        record["config"]["models"] = {"experts": {"math": folder}}
        record["models"] = copy.deepcopy(record["models"])
        record["models"]["experts"]["math"]["sha256"] = folder
    joined, _ = as_one_record(records)
    other = "math models.experts.math=B"
    assert list(joined["models"]["experts"]) == ["math", "code", other]
    table = standings(joined)
    assert [row.model for row in table.role("expert")] == ["math", "code", other]
    against = {row["b"] for row in joined["comparisons"] if row["a"] == "linear models.experts.math=B"}
    assert other in against
    assert "math" not in against


def test_the_tasks_that_select_do_so_in_the_table_of_a_multirun_too(full):
    records = jobs(full[0], [("ties", 0.5), ("linear", 0.5)])
    for record in records:
        record["config"]["evaluation"] = {"select": ["tiny_math"]}
    assert standings(as_one_record(records)[0]).select == ("tiny_math",)
