"""The store against every truncation, any flipped byte, several writers and a full disk."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotrl.errors import EvaluationError
from rotrl.evaluate.store import Store, decode, encode

ROWS = [
    (f"key{i}", {"text": text, "n": i})
    for i, text in enumerate(["plain", "\u2028 é \ud800", "a\nb\x00", "", "x" * 500])
]


def fill(folder: Path) -> Path:
    store = Store(folder)
    store.append(ROWS)
    store.close()
    return next(folder.glob("*.jsonl"))


def test_rows_come_back_and_lines_are_json(tmp_path):
    file = fill(tmp_path)
    again = Store(tmp_path)
    assert [again.get(key) for key, _ in ROWS] == [row for _, row in ROWS]
    assert (len(again), again.damaged, again.get("absent")) == (5, 0, None)
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == [key for key, _ in ROWS]


def test_a_store_that_is_only_read_leaves_nothing(tmp_path):
    Store(tmp_path / "absent").close()
    assert not (tmp_path / "absent").exists()


def test_any_cut_keeps_the_whole_lines(tmp_path):
    data = b"".join(encode(*row) for row in ROWS)
    ends = [len(b"".join(encode(*row) for row in ROWS[: i + 1])) for i in range(5)]
    for length in range(len(data) + 1):
        (tmp_path / "a.jsonl").write_bytes(data[:length])
        store = Store(tmp_path)
        assert len(store) == sum(end <= length for end in ends)
        assert store.damaged == 0


@settings(max_examples=200)
@given(st.data())
def test_a_changed_byte_never_gives_a_changed_row(data):
    line = encode(*data.draw(st.sampled_from(ROWS)))
    place = data.draw(st.integers(0, len(line) - 2))
    byte = data.draw(st.integers(0, 255))
    changed = line[:place] + bytes([byte]) + line[place + 1 :]
    decoded = decode(changed)
    assert decoded is None or decoded == decode(line)


def test_a_bad_middle_line_is_set_aside_and_missing(tmp_path):
    file = fill(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"key1", b"keyX")
    file.write_bytes(b"".join(lines))
    for _ in range(2):  # reading twice changes nothing
        store = Store(tmp_path)
        assert (len(store), store.damaged, store.get("key1"), store.get("keyX")) == (4, 1, None, None)
    assert file.with_name(f"{file.name}.quarantine").read_bytes() == lines[1]


def test_two_stores_on_one_folder_write_files_of_their_own(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    for i in range(50):
        first.append([(f"a{i}", {"i": i})])
        second.append([(f"b{i}", {"i": i})])
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert len(Store(tmp_path)) == 100


WRITER = """
import sys
from pathlib import Path
from rotrl.evaluate.store import Store
store, i = Store(Path(sys.argv[1])), 0
while True:
    store.append([(f"{i}.{j}", {"text": "x" * 300}) for j in range(20)])
    print(i, flush=True)
    i += 1
"""


def test_sigkill_loses_at_most_the_write_under_way(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 20:
        pass
    time.sleep(0.01)
    writer.kill()
    acknowledged = 21 + len(writer.stdout.read().splitlines())
    writer.wait()
    store = Store(tmp_path)
    assert store.damaged == 0
    assert all(store.get(f"{i}.{j}") for i in range(acknowledged) for j in range(20))


FULL = """
import resource, signal, sys
from pathlib import Path
from rotrl.evaluate.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = Store(Path(sys.argv[1]))
store.append([("kept", {"text": "x" * 600})])
store.append([("lost", {"text": "y" * 600})])
"""


def test_a_full_disk_is_one_line_and_what_was_kept_is_kept(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert "EvaluationError" in done.stderr.splitlines()[-1]
    assert "free space" in done.stderr.splitlines()[-1]
    store = Store(tmp_path)
    assert (store.get("lost"), store.damaged) == (None, 0)
    assert store.get("kept") is not None


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="file"):
        Store(tmp_path / "file" / "inside").append(ROWS)


def test_many_rows_open_fast(tmp_path):
    """A million in 30 seconds and 2 GB: here 50,000 in a twentieth of both."""
    (tmp_path / "a.jsonl").write_bytes(
        b"".join(encode(f"{i:x}" * 8, {"completion": "3+4=7;7*2=14;\\boxed{14}", "i": i}) for i in range(50_000))
    )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert len(Store(tmp_path)) == 50_000
    assert time.process_time() - start < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert os.listdir(tmp_path) == ["a.jsonl"]
