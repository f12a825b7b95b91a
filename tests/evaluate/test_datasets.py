"""Loaders of published sets, on rows of their schema written here and on a hub that this process serves."""

import base64
import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import EvaluationError
from rotrl.evaluate.datasets import math
from rotrl.evaluate.datasets.hidden import hidden_tests, inflate, pickled_text
from rotrl.evaluate.datasets.livecodebench import FILES, livecodebench, training_prompts
from rotrl.evaluate.datasets.source import fill, rows
from rotrl.evaluate.grade import Grader
from rotrl.evaluate.task import Test as Case

AIME = [
    {"id": 60, "problem": "What is $20+5$?", "solution": "Add.", "answer": "025", "url": "", "year": "2024"},
    {"id": 61, "problem": "How many {sets}?", "solution": "Count.", "answer": "204", "url": "", "year": "2024"},
]


def lines(path: Path, found: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


# Mathematics


def test_a_zero_padded_answer_stays_a_text_and_the_prompt_asks_for_a_box(tmp_path):
    task = math.aime24(path=lines(tmp_path / "aime.jsonl", AIME), problems=2)
    assert (task.name, task.grader, task.source) == ("aime24", "math", str(tmp_path / "aime.jsonl"))
    assert [(p.id, p.answer) for p in task.problems] == [("60", "025"), ("61", "204")]
    assert task.problems[1].prompt.startswith("How many {sets}?\n")
    assert "\\boxed{}" in task.problems[1].prompt


@pytest.mark.parametrize(
    ("load", "row", "identity"),
    [
        (math.aime25, {"problem": "p", "answer": "70", "id": "0"}, "0"),
        (math.math500, {"problem": "p", "solution": "s", "answer": "\\frac{1}{2}", "unique_id": "test/a/1.json"}, None),
        (math.amc23, {"id": 0, "question": "p", "answer": 27.0, "url": "u"}, "0"),
        (math.deepscaler, {"problem": "p", "answer": "x", "solution": "s"}, "0"),
        (math.minerva, {"question": "p", "answer": "4.5e33"}, "0"),
    ],
)
def test_each_set_is_read_in_its_own_schema(tmp_path, load, row, identity):
    (problem,) = load(path=lines(tmp_path / "set.jsonl", [row]), problems=1).problems
    assert problem.id == (identity or row["unique_id"])
    assert problem.prompt.startswith("p\n")
    assert problem.answer == ("27" if row["answer"] == 27.0 else row["answer"])


@pytest.mark.parametrize("name", ["aime24.jsonl", "aime24.json", "data/aime24.jsonl", "test.jsonl"])
def test_a_folder_is_searched_by_the_hubs_name_and_the_tasks(tmp_path, name):
    lines(tmp_path / name, AIME)
    known = name in ("aime24.jsonl", "aime24.json")
    if known:
        assert len(math.aime24(path=tmp_path, problems=2).problems) == 2
    else:
        with pytest.raises(EvaluationError, match=r"evaluation\.tasks\.aime24\.path=.*found .*needs data/train-0"):
            math.aime24(path=tmp_path, problems=2)
    lines(tmp_path / "test.jsonl", [{"problem": "p", "answer": "1", "id": "0"}])
    assert len(math.aime25(path=tmp_path, problems=1).problems) == 1


def test_a_json_array_and_json_lines_are_the_same_rows(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps(AIME, indent=1))
    assert list(rows(tmp_path / "array.json")) == list(rows(lines(tmp_path / "lines.json", AIME))) == AIME


def test_a_parquet_file_gives_the_same_rows_or_names_what_reads_it(tmp_path):
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    try:
        import pyarrow as pa  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        file.write_bytes(b"PAR1")
        with pytest.raises(EvaluationError, match=r"train-0.*needs pyarrow.*JSON lines"):
            math.aime24(path=tmp_path)
    else:
        parquet.write_table(pa.Table.from_pylist(AIME), file)
        assert (
            math.aime24(path=tmp_path, problems=2).problems
            == math.aime24(path=lines(tmp_path / "x.jsonl", AIME), problems=2).problems
        )
        file.write_bytes(b"PAR1")
        with pytest.raises(EvaluationError, match=r"train-0.*not a parquet file"):
            math.aime24(path=tmp_path)


def test_half_a_set_is_refused_and_a_limit_takes_its_first_problems(tmp_path):
    file = lines(tmp_path / "aime.jsonl", AIME)
    with pytest.raises(EvaluationError, match=r"aime\.jsonl: found 2 rows, expected 30: .*HuggingFaceH4/aime_2024"):
        math.aime24(path=file)
    assert [p.id for p in math.aime24(path=file, limit=1).problems] == ["60"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"id": 1, "problem": "p", "answer": "1"}\n{"id": 2, "problem": "p"}\n',
            r"row 2: answer missing; .*id, problem",
        ),
        ('{"id": 1, "problem": "p", "answer": null}', r"row 1: answer missing"),
        ('{"id": 1, "problem": "p", "answer": 0.5}', r"row 1, field answer: found 0\.5"),
        ('{"id": 1, "problem": " ", "answer": "1"}', r"row 1, field problem: found ' '"),
        ('{"id": 1, "problem": "p", "answer": "1"}\n{', r"line 2: not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", r"line 1: not JSON .*version https://git-lfs"),
        ("[1]", r"row 1: found a int, expected an object"),
        ("[{]", r"line 1: not JSON"),
        ("", r"found 0 rows, expected 2"),
    ],
)
def test_a_broken_copy_is_named_by_file_and_place(tmp_path, text, message):
    file = tmp_path / "aime.jsonl"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=message) as error:
        math.aime24(path=file, problems=2)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_path_is_named_by_its_key(tmp_path):
    with pytest.raises(EvaluationError, match=r"evaluation\.tasks\.math500\.path=.*no such file or folder"):
        math.math500(path=tmp_path / "absent")


def test_a_draw_of_training_problems_is_the_seeds(tmp_path):
    found = [{"problem": f"p{i}", "answer": str(i), "solution": ""} for i in range(50)]
    file = lines(tmp_path / "deepscaler.json", found)
    drawn = math.deepscaler(path=tmp_path, problems=50, limit=10, seed=1)
    assert drawn == math.deepscaler(path=tmp_path, problems=50, limit=10, seed=1)
    assert drawn.problems != math.deepscaler(path=file.parent, problems=50, limit=10, seed=2).problems
    assert len(drawn.problems) == 10
    assert all(p.id == p.answer for p in drawn.problems)


def test_a_template_is_filled_once_and_must_hold_its_names():
    assert fill("a {x} \\boxed{} {y}", "k", x="{y}", y="2") == "a {y} \\boxed{} 2"
    with pytest.raises(EvaluationError, match=r"k\.prompt: \{y\} is missing"):
        fill("{x}", "k", x="1", y="2")


def olympiad_row(identity: int, answers: list, **other: object) -> dict:
    row = {"id": identity, "question": "p", "solution": ["s"], "final_answer": answers, "context": None}
    image = {f"image_{i}": None for i in range(1, 6)}
    kinds = {"modality": "Text-only", "difficulty": "Competition", "is_multiple_answer": False, "unit": None}
    kinds |= {"answer_type": "Numerical", "error": None, "question_type": "Open-ended", "subfield": "Algebra"}
    return {**row, **image, **kinds, "subject": "Math", "language": "English", **other}


OLYMPIAD = [
    olympiad_row(1606, [r"$\frac{1}{2}$"]),
    olympiad_row(1610, ["2"], context="Let $n$ be even."),
    olympiad_row(1612, ["$1,2$"], is_multiple_answer=True),
    olympiad_row(1613, ["$(1,2)$", "$(3,4)$"], is_multiple_answer=True),
    olympiad_row(1614, [r"\$ 5.50."]),
]


def test_olympiads_answers_lose_their_dollars_and_stand_in_one_box(tmp_path):
    first, second, third, fourth, fifth = math.olympiad(path=lines(tmp_path / "o.jsonl", OLYMPIAD), problems=5).problems
    assert [p.answer for p in (first, second, third, fourth, fifth)] == [
        r"\frac{1}{2}",
        "2",
        "1,2",
        "(1,2), (3,4)",
        r"\$ 5.50",
    ]
    assert first.id == "1606"
    assert second.prompt.startswith("Let $n$ be even.\n\np\n")
    assert "several answers" in third.prompt
    assert "several answers" not in first.prompt
    task = math.olympiad(path=tmp_path / "o.jsonl", problems=5)
    with Grader([task], math={"workers": 1}) as grader:
        for box, problem, right in [("0.5", 0, True), ("2, 1", 2, True), ("1", 2, False), ("(3,4),(1,2)", 3, True)]:
            assert grader.submit(task, task.problems[problem], rf"\boxed{{{box}}}").result().correct is right, box


@pytest.mark.parametrize("answers", [[], "1", [1], None, [" "]])
def test_an_olympiad_row_without_answers_is_named(tmp_path, answers):
    with pytest.raises(EvaluationError, match=r"o\.jsonl, row 1.*final_answer"):
        math.olympiad(path=lines(tmp_path / "o.jsonl", [olympiad_row(1, answers)]), problems=1)


# Hidden tests of LiveCodeBench


def pack(found: object, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(found, protocol))).decode()


@given(st.text(), st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_the_text_of_a_pickle_is_read_without_unpickling(text, protocol):
    assert pickled_text(pickle.dumps(text, protocol)) == text


@pytest.mark.parametrize("size", [255, 256, 65_535, 65_536, 300_000])
def test_long_texts_leave_the_pickles_frame(size):
    assert pickled_text(pickle.dumps("é" * size)) == "é" * size


@given(st.data())
def test_arbitrary_bytes_give_a_text_or_a_refusal(data):
    good = bytearray(pickle.dumps("some text", data.draw(st.integers(0, pickle.HIGHEST_PROTOCOL))))
    good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    for found in (bytes(good), data.draw(st.binary(max_size=50))):
        with contextlib.suppress(ValueError):
            assert type(pickled_text(found)) is str


@given(st.data())
def test_a_damaged_packed_field_gives_tests_or_a_refusal(data):
    good = pack('[{"input": "1", "output": "2", "testtype": "stdin"}]')
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.sampled_from(["", "A", "*", "=="])) + good[at + 1 :]
    with contextlib.suppress(EvaluationError):
        assert isinstance(hidden_tests(bad, "row"), list)


class Harm:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_a_pickle_that_calls_something_is_refused_before_it_can(tmp_path):
    target = tmp_path / "touched"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(EvaluationError, match="opcode"):
            hidden_tests(pack(Harm(target), protocol), "row")
        with pytest.raises(EvaluationError, match="opcode"):
            hidden_tests(pack(["[]", Harm(target)], protocol), "row")
    assert not target.exists()
    pickle.loads(pickle.dumps(Harm(target)))  # the attack is real
    assert target.exists()


@pytest.mark.parametrize("found", [b"[]", ["[]"], ("[]",), 1, None, {"a": "[]"}])
def test_a_pickle_of_anything_but_one_text_is_refused(found):
    with pytest.raises(EvaluationError, match="opcode"):
        hidden_tests(pack(found), "row")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04.",  # no text
        pickle.dumps("[]") + b"x",  # something after the end
        pickle.dumps("[]")[:-1] + pickle.dumps("[]")[2:],  # two texts
        b"\x80\x02cos\nsystem\n.",  # a global
        b"\x80\x02Pid\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x04" + b"\x94" * 10_000 + b".",  # opcodes without end
    ],
)
def test_crafted_pickles_are_refused(data):
    with pytest.raises(ValueError, match="expected one text"):
        pickled_text(data)


def test_a_memo_index_that_costs_an_unpickler_gigabytes_costs_nothing():
    assert pickled_text(b"\x80\x02X\x02\x00\x00\x00[]r\xff\xff\xff\xff.") == "[]"


def test_a_decompression_bomb_stops_at_the_limit():
    assert inflate(zlib.compress(b"x" * 1000), 1000) == b"x" * 1000
    with pytest.raises(ValueError, match="more than 999 bytes"):
        inflate(zlib.compress(b"x" * 1000), 999)
    with pytest.raises(ValueError, match="cut"):
        inflate(zlib.compress(os.urandom(1000))[:-8], 10_000)
    bomb = base64.b64encode(zlib.compress(bytes(50_000_000))).decode()
    with pytest.raises(EvaluationError, match="more than 1000000 bytes"):
        hidden_tests(bomb, "row", limit=1_000_000)


# LiveCodeBench

STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALL = [{"input": '[1, 2]\n"a"', "output": "[3, null]", "testtype": "functional"}]


def contest(identity: str, day: str, **other: object) -> dict:
    return {
        "question_title": identity,
        "question_content": f"About {identity}.",
        "platform": "atcoder",
        "question_id": identity,
        "contest_id": "c",
        "contest_date": f"{day}T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(STDIN),
        "private_test_cases": pack(json.dumps(STDIN * 2)),
        "metadata": "{}",
        **other,
    }


FUNCTION = {
    "starter_code": "class Solution:\n    def join(self, a: list, b: str) -> list:\n        ",
    "public_test_cases": json.dumps(CALL),
    "private_test_cases": json.dumps(CALL),
    "metadata": json.dumps({"func_name": "join"}),
}
SMALL = dict.fromkeys(FILES, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    days = ["2023-05-07", "2024-04-01", "2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01"]
    for file, day in zip(FILES, days, strict=True):
        lines(tmp_path / file, [contest(day, day, **(FUNCTION if file == "test5.jsonl" else {}))])
    return tmp_path


def test_a_window_is_half_open_and_a_release_is_cumulative(folder):
    task = livecodebench(path=folder, files=SMALL, problems=2)
    assert [p.id for p in task.problems] == ["2024-08-01", "2025-01-31"]
    assert (task.name, task.grader) == ("livecodebench", "code")
    assert task.source == f"{folder} release_v5 [2024-08-01, 2025-02-01)"
    everything = livecodebench(path=folder, files=SMALL, problems=6, start=None, end=None, release="release_v6")
    assert len(everything.problems) == 6
    v2 = livecodebench(path=folder, files=SMALL, problems=None, start=None, end=None, release="release_v2")
    assert [p.id for p in v2.problems] == ["2023-05-07", "2024-04-01"]


def test_files_published_before_the_window_are_not_needed(folder):
    (folder / "test.jsonl").unlink()
    (folder / "test2.jsonl").unlink()
    assert len(livecodebench(path=folder, files=SMALL, problems=2).problems) == 2
    with pytest.raises(EvaluationError, match=r"needs test\.jsonl"):
        livecodebench(path=folder, files=SMALL, start="2024-06-30")


def test_stdin_and_functional_problems_get_their_tests_and_their_prompts(folder):
    stdin, functional = livecodebench(path=folder, files=SMALL, problems=2).problems
    assert stdin.entry_point is None
    assert stdin.tests == (Case("1 2\n", "3\n"),) * 3
    assert "About 2024-08-01." in stdin.prompt
    assert "standard input" in stdin.prompt
    assert functional.entry_point == "join"
    assert functional.tests == (Case([[1, 2], "a"], [3, None]),) * 2
    assert "def join(self, a: list, b: str) -> list:" in functional.prompt
    assert "standard input" not in functional.prompt


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"metadata": '{"func_name": "a b"}'}, "field metadata: func_name 'a b'"),
        ({"metadata": "{"}, "field metadata: not JSON"),
        ({"metadata": '{"func_name": "f"}'}, "test 0: not JSON"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "no tests"),
        ({"public_test_cases": "[1]"}, "test 0: input and output must be texts"),
        ({"private_test_cases": pack(b"[]")}, "field private_test_cases: a pickle with the opcode"),
        ({"private_test_cases": "{}"}, "field private_test_cases: found a dict"),
        ({"private_test_cases": "nonsense"}, "field private_test_cases: "),
        ({"contest_date": "soon"}, "field contest_date: 'soon' is no date"),
        ({"question_content": None}, "question_content missing"),
    ],
)
def test_a_broken_problem_is_named_by_file_row_and_field(tmp_path, other, message):
    file = lines(tmp_path / "window.jsonl", [contest("q1", "2024-09-01", **other)])
    with pytest.raises(EvaluationError) as error:
        livecodebench(path=file, problems=1)
    assert f"{file}, row 1" in str(error.value)
    assert message in str(error.value)


def test_counts_of_files_and_of_the_window_are_asserted(folder):
    with pytest.raises(EvaluationError, match=r"test3\.jsonl: found 1 rows, expected 101"):
        livecodebench(path=folder)
    with pytest.raises(EvaluationError, match=r"found 2 problems of release_v5 in .*expected 279.*problems=2"):
        livecodebench(path=folder, files=SMALL)
    with pytest.raises(EvaluationError, match=r"evaluation\.tasks\.lcb\.release: 'v5' is unknown; one of release_v1"):
        livecodebench(path=folder, release="v5", name="lcb")
    with pytest.raises(EvaluationError, match=r"start: '1 August' is no date"):
        livecodebench(path=folder, start="1 August")
    assert len(livecodebench(path=folder, files=SMALL, limit=1).problems) == 1


def test_training_prompts_carry_no_tests_and_need_none_to_be_read(folder):
    lines(folder / "test.jsonl", [contest("old", "2023-06-01", private_test_cases="not read")])
    task = training_prompts(path=folder, files=SMALL)
    assert (task.name, [p.id for p in task.problems]) == ("livecodebench_training", ["old", "2024-04-01"])
    assert all(p.tests == () and "About" in p.prompt for p in task.problems)
    assert len(training_prompts(path=folder, files=SMALL, limit=1, seed=3).problems) == 1
    with pytest.raises(EvaluationError, match=r"models\.prompts\.EXPERT\.path=.*no such file or folder"):
        training_prompts(path=folder / "absent")


def test_what_is_loaded_is_what_the_graders_take(folder, tmp_path):
    code = livecodebench(path=folder, files=SMALL, problems=2)
    numbers = math.aime24(path=lines(tmp_path / "aime.jsonl", AIME), problems=2)
    stdin = "```python\nprint(sum(map(int, input().split())))\n```"
    function = "```python\nclass Solution:\n    def join(self, a, b):\n        return [sum(a), None]\n```"
    with Grader([code, numbers]) as grader:
        verdicts = [
            grader.submit(code, code.problems[0], stdin).result(),
            grader.submit(code, code.problems[1], function).result(),
            grader.submit(code, code.problems[1], stdin).result(),
            grader.submit(numbers, numbers.problems[0], "So it is \\boxed{25}.").result(),
        ]
    assert [verdict.correct for verdict in verdicts] == [True, True, False, True]


# The hub, through its real client

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """The two addresses of a hub that a download asks for."""

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "X-Repo-Commit": COMMIT, "ETag": '"tag"'}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/math-ai/aime25"):
            self.answer(
                json.dumps({"id": "math-ai/aime25", "sha": COMMIT, "siblings": []}).encode(), "application/json"
            )
        elif self.path == f"/datasets/math-ai/aime25/resolve/{COMMIT}/test.jsonl":
            self.answer(json.dumps({"problem": "p", "answer": "007", "id": "0"}).encode(), "text/plain")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def load_in_a_process(endpoint: str, home: Path, arguments: str) -> str:
    """The client reads its endpoint and cache from the environment when it is imported."""
    code = (
        "from rotrl.evaluate.datasets.math import aime25\n"
        "from rotrl.errors import EvaluationError\n"
        f"try: print((task := aime25({arguments})).source, task.problems[0].answer)\n"
        "except EvaluationError as error: print('error:', error)\n"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PATH": os.environ["PATH"], "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_newest_revision_is_resolved_and_a_cached_commit_needs_no_hub(tmp_path):
    closed = "http://127.0.0.1:9"
    unreachable = load_in_a_process(closed, tmp_path, "")
    assert unreachable.startswith(
        "error: aime25: math-ai/aime25 (test.jsonl) is neither in the hub's cache nor reachable"
    )
    assert unreachable.endswith("give a local copy: evaluation.tasks.aime25.path=DIR")
    assert "\n" not in unreachable

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        newest = load_in_a_process(f"http://127.0.0.1:{server.server_port}", tmp_path, "revision=None, problems=1")
    finally:
        server.shutdown()
        server.server_close()
    assert newest == f"math-ai/aime25@{COMMIT} 007"
    assert load_in_a_process(closed, tmp_path, f"revision={COMMIT!r}, problems=1") == newest
