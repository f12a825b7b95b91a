"""Completions from elsewhere: what is read, refused with its line, graded, and told where samples are missing."""

import csv
import json

import pytest

from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate.completions import read_completions, read_samples
from rotrl.evaluate.regrade import check, regrade, roles_of
from rotrl.evaluate.scores import COMPARISONS, SCORES
from rotrl.evaluate.task import Problem, Task

SUMS = Task("sums", tuple(Problem(f"s{i}", f"{i}+1=", answer=str(i + 1)) for i in range(6)), "math")
MORE = Task("more", (Problem("m", "2+2=", answer="4"),), "math")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def row(problem="s0", text=r"\boxed{1}", **changes):
    return {"task": "sums", "problem_id": problem, "completion": text} | changes


def grade(samples, tmp_path, tasks=(SUMS,), **changes):
    options = {"protocol": {"name": "p", "ks": [1]}, "sandbox": {}, "seed": 0, "cache": tmp_path / "cache"}
    options |= {"roles": roles_of(samples, ["math"]), "out": tmp_path / "run"}
    return regrade(samples, tasks, **options | changes)


def test_samples_without_an_index_are_counted_and_a_model_without_a_name_is_the_base(tmp_path):
    file = write(tmp_path / "c.jsonl", [row(), row(), row("s1"), row(model="m", sample_index=7, tokens=3)])
    found = read_completions(file, [SUMS])
    assert [(r["problem_id"], r["sample_index"]) for r in found["base"]] == [("s0", 0), ("s0", 1), ("s1", 0)]
    assert found["m"] == [row(sample_index=7, tokens=3, finish_reason=None)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(), row("x"), row("y", task="summs")], ["line 2: sums has no problem 'x'", "line 3: no task 'summs'"]),
        ([row(sample_index=0), row(sample_index=0)], ["line 2", "sample 0 of problem 's0'", "stands on line 1"]),
        ([row()] + [row(f"x{i}") for i in range(9)], ["line 2", "line 4", "6 more of the kind"]),
        ([row(text=None)], ["line 1, field completion: found None"]),
        ([row(sample_index=-1)], ["line 1, field sample_index: found -1"]),
        ([row(tokens="many")], ["line 1, field tokens: found 'many'"]),
        ([{"task": "sums", "completion": "x"}], ["line 1, field problem_id: found None"]),
        ([[1]], ["line 1: found a list"]),
        ([], ["no completions"]),
    ],
)
def test_what_is_no_completion_is_one_line(tmp_path, rows, words):
    file = write(tmp_path / "c.jsonl", rows)
    with pytest.raises(EvaluationError) as caught:
        read_completions(file, [SUMS])
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_that_is_no_jsonl_is_one_line(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"task": "sums"\n')
    with pytest.raises(EvaluationError, match="line 1: not JSON"):
        read_completions(str(tmp_path / "c.jsonl"), [SUMS])
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match="UTF-8"):
        read_completions(str(tmp_path / "c.jsonl"), [SUMS])
    with pytest.raises(EvaluationError, match="name one"):
        read_completions(write(tmp_path / "d.jsonl", [{"problem_id": "m", "completion": ""}]), [SUMS, MORE])


def document(place, target, texts, **changes):
    return {"doc_id": place, "doc": {"problem": "?"}, "target": target, "resps": [texts], "filter": "none"} | changes


def test_the_samples_of_lm_eval_are_read_by_id_or_by_place_with_its_answer(tmp_path):
    rows = [document(1, "2", ["a", "b"]), document(0, "none", ["c"], doc={"id": "s3"})]
    rows += [document(1, "2", ["a", "b"], filter="strict")]
    found = read_completions({"tiny": write(tmp_path / "l.jsonl", rows)}, [SUMS])
    assert [(r["problem_id"], r["sample_index"], r["completion"]) for r in found["tiny"]] == [
        ("s1", 0, "a"),
        ("s1", 1, "b"),
        ("s3", 0, "c"),
    ]
    with pytest.raises(EvaluationError, match="its target '9' is not the answer of problem 's1'"):
        read_completions(write(tmp_path / "w.jsonl", [document(1, "9", ["a"])]), [SUMS])
    with pytest.raises(EvaluationError, match="only generated text"):
        read_completions(write(tmp_path / "p.jsonl", [document(1, "2", [[-1.5, True]])]), [SUMS])
    with pytest.raises(EvaluationError, match="found 99; sums has 6 problems"):
        read_completions(write(tmp_path / "o.jsonl", [document(99, "2", ["a"])]), [SUMS])


def test_they_are_graded_into_the_contract(tmp_path):
    right = [
        row(f"s{i}", rf"\boxed{{{i + 1}}}", finish_reason="stop", sample_index=j) for i in range(6) for j in (0, 1)
    ]
    half = [r | {"completion": r["completion"] if r["sample_index"] else "?"} for r in right]
    samples = {"base": half, "math": right}
    found = grade(samples, tmp_path)
    value = {(r["model"], r["metric"]): r["value"] for r in found["scores"]}
    assert (value["base", "avg@2"], value["math", "avg@2"]) == (0.5, 1.0)
    (compared,) = found["comparisons"]
    assert (compared["a"], compared["b"], compared["difference"], compared["wins"]) == ("math", "base", 0.5, 6)
    assert (found["alarms"], found["graded"]) == ([], 24)
    for columns, name in ((SCORES, "scores"), (COMPARISONS, "comparisons")):
        assert tuple(next(csv.reader((tmp_path / f"run/{name}.csv").open()))) == columns
    written = read_samples(tmp_path / "run", ["base", "math"])
    assert [r["verdict"] for r in written["base"][:2]] == ["no answer", "accepted"]
    again = grade(written, tmp_path, out=tmp_path / "again")
    assert again["scores"] == found["scores"]
    assert (tmp_path / "again/samples/math.jsonl").read_bytes() == (tmp_path / "run/samples/math.jsonl").read_bytes()


def test_uneven_samples_are_told_and_each_problem_counts_the_same(tmp_path):
    rows = [row("s0", r"\boxed{1}", sample_index=i) for i in (10, 11, 12)] + [row("s1", "?", sample_index=10)]
    other = [row("m", r"\boxed{4}", task="more", sample_index=0, finish_reason="length")]
    found = grade({"base": rows + other, "x": rows}, tmp_path, (SUMS, MORE))
    first = found["scores"][0]
    assert (first["metric"], first["value"], first["problems"], first["samples"]) == ("avg@3", 0.5, 2, 4)
    assert (first["truncated"], first["tokens"]) == (None, None)
    assert found["alarms"] == [
        "base, more: 1 of 1 samples were cut off at the token limit; raise protocol.max_tokens",
        "base, sums: 4 of 6 problems have no sample and are left out",
        "base, sums: 1 of 6 problems have fewer than 3 samples (the least 1)",
        "base, sums: how 4 samples ended is not known, so none counts as cut off",
        "x has no samples of more",
        "x, sums: 4 of 6 problems have no sample and are left out",
        "x, sums: 1 of 6 problems have fewer than 3 samples (the least 1)",
        "x, sums: how 4 samples ended is not known, so none counts as cut off",
    ]


def test_samples_that_are_copies_of_one_are_told(tmp_path):
    sums = Task("sums", tuple(Problem(f"s{i}", "?", answer="1") for i in range(12)), "math")
    rows = [row(f"s{i}", rf"\boxed{{{i}}}", sample_index=j, finish_reason="stop") for i in range(12) for j in range(4)]
    (said,) = grade({"base": rows}, tmp_path, (sums,))["alarms"]
    assert said.startswith("base, sums: all samples of each problem are one text")
    rows[-1]["completion"] = "other"
    assert grade({"base": rows}, tmp_path, (sums,))["alarms"] == []


def test_a_model_that_closes_its_thoughts_somewhere_has_opened_them_everywhere(tmp_path):
    texts = ["so</think>1", "still thinking"]
    found = grade({"base": [row(text=text, sample_index=i) for i, text in enumerate(texts)]}, tmp_path)
    assert found["scores"][0]["unfinished"] == 1
    found = grade({"base": [row(text="no thoughts", sample_index=0)]}, tmp_path)
    assert found["scores"][0]["unfinished"] == 0


def test_what_can_not_be_graded_is_refused():
    samples = {"base": [row(sample_index=0), row("gone", sample_index=0), row("gone", sample_index=1)]}
    with pytest.raises(EvaluationError, match=r"2 samples are of problems that the tasks have not.*'gone' of sums"):
        check(samples, [SUMS], [1])
    with pytest.raises(ConfigError, match=r"pass@4 can't be estimated from n=1"):
        check({"base": [row(sample_index=3)]}, [SUMS], [1, 4])


def test_unknown_names_are_merges_only_beside_known_experts():
    assert roles_of(["base", "a", "b"], ["math"]) == {"base": "base", "a": "expert", "b": "expert"}
    assert roles_of(["base", "math", "b"], ["math"]) == {"base": "base", "math": "expert", "b": "merge"}
