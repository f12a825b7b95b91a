"""A user's own problems: what is read, and what is said of a line that can't be."""

import json

import pytest

from rotrl.errors import EvaluationError
from rotrl.evaluate import task as t


def read(tmp_path, *rows, **options):
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows))
    return t.custom(file, **options)


def test_math_problems(tmp_path):
    found = read(tmp_path, {"id": "a", "prompt": "1+1?", "answer": "2"}, "", {"id": 7, "problem": "½?", "answer": 0.5})
    assert found == t.Task("problems", (t.Problem("a", "1+1?", answer="2"), t.Problem("7", "½?", answer="0.5")), "math")


def test_code_problems_with_and_without_entry_point(tmp_path):
    found = read(
        tmp_path,
        {"id": "f", "prompt": "add", "tests": [{"input": [1, 2], "output": 3}], "entry_point": "add"},
        {"id": "s", "prompt": "echo", "tests": [{"input": "a\n", "output": "a\n"}]},
        name="mine",
    )
    assert (found.name, found.grader) == ("mine", "code")
    assert found.problems[0] == t.Problem("f", "add", tests=(t.Test([1, 2], 3),), entry_point="add")
    assert found.problems[1].tests == (t.Test("a\n", "a\n"),)


def test_limit_and_line_separators_inside_text(tmp_path):
    rows = [{"id": str(i), "prompt": "line\u2028separator", "answer": "1"} for i in range(5)]
    assert [p.id for p in read(tmp_path, *rows, limit=2).problems] == ["0", "1"]
    assert len(read(tmp_path, *rows).problems) == 5


GOOD = {"id": "good", "prompt": "1+1?", "answer": "2"}
TEST = {"input": "1", "output": "2"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: found a list"),
        ({"prompt": "x", "answer": "1"}, "line 2, field id: missing"),
        ({"id": "a", "answer": "1"}, "line 2, field prompt: missing"),
        ({"id": "a", "prompt": 3, "answer": "1"}, "line 2, field prompt: found 3"),
        ({"id": "a", "prompt": "x", "answer": ""}, "line 2, field answer: found ''"),
        ({"id": "a", "prompt": "x", "answer": True}, "line 2, field answer: found True"),
        ({"id": "a", "prompt": "x"}, "line 2: give exactly one of answer"),
        ({"id": "a", "prompt": "x", "answer": "1", "tests": [TEST]}, "line 2: give exactly one of answer"),
        ({"id": "a", "prompt": "x", "tests": [TEST]}, "line 2: math .* and code .* are mixed"),
        ({"id": "a", "prompt": "x", "tests": []}, "line 2, field tests: found"),
        ({"id": "a", "prompt": "x", "tests": [{"input": "1"}]}, r"line 2, field tests\[0\]: expected"),
        (
            {"id": "a", "prompt": "x", "tests": [{"input": 1, "output": "2"}]},
            r"line 2, field tests\[0\].input: without",
        ),
        ({"id": "a", "prompt": "x", "tests": [TEST], "entry_point": "f"}, r"line 2, field tests\[0\].input: with"),
        ({"id": "a", "prompt": "x", "tests": [TEST], "entry_point": "f x"}, "line 2, field entry_point: 'f x'"),
        (GOOD, "line 2, field id: 'good' was used on line 1"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path, row, words):
    with pytest.raises(EvaluationError, match=f"problems.jsonl, {words}") as caught:
        read(tmp_path, GOOD, row)
    assert "\n" not in str(caught.value)


def test_files_without_problems(tmp_path):
    with pytest.raises(EvaluationError, match=r"problems.jsonl: no problems"):
        read(tmp_path)
    with pytest.raises(EvaluationError, match=r"absent.jsonl: can't be read"):
        t.custom(tmp_path / "absent.jsonl")
    with pytest.raises(EvaluationError, match=r"set evaluation\.path"):
        t.custom(None)
    (tmp_path / "latin").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(EvaluationError, match="latin: can't be read as UTF-8"):
        t.custom(tmp_path / "latin")


def test_a_task_refuses_an_unknown_grader_double_ids_and_nothing():
    one = t.Problem("a", "x", answer="1")
    for problems, grader, words in [((one,), "vibes", "'vibes' is unknown"), ((one, one), "math", "'a' occurs twice")]:
        with pytest.raises(EvaluationError, match=words):
            t.Task("t", problems, grader)
    with pytest.raises(EvaluationError, match="no problems"):
        t.Task("t", (), "math")
