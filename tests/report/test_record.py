import json
import os
import re
import stat
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotrl.errors import ConfigError
from rotrl.report.record import Record
from rotrl.report.redact import HIDDEN, is_secret, redact


def test_what_is_saved_is_read_again(full):
    record, run_dir = full
    Record(run_dir / "record.json", dict(record)).save()
    again = Record.open(run_dir)
    assert again.data["scores"] == record["scores"]
    assert again.data == Record(run_dir / "record.json").data
    assert stat.S_IMODE((run_dir / "record.json").stat().st_mode) == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_fresh_record_is_empty_and_makes_its_folder(tmp_path):
    record = Record(tmp_path / "new" / "record.json")
    assert record.data == {}
    record.data["status"] = "running"
    record.save()
    assert Record.open(tmp_path / "new" / "record.json").data == {"status": "running"}


def test_a_reader_never_sees_half_a_record(tmp_path):
    record = Record(tmp_path / "record.json", {"scores": ["x" * 500] * 200, "n": 0})
    record.save()
    stop, torn = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                json.loads((tmp_path / "record.json").read_text())
            except ValueError as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(30):
        record.data["n"] = n
        record.save()
    stop.set()
    reader.join()
    assert not torn
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_failed_save_leaves_the_old_record(tmp_path, monkeypatch):
    record = Record(tmp_path / "record.json", {"n": 1})
    record.save()
    monkeypatch.setattr("rotrl.checkpoint.files.fsync", _disk_full)
    record.data["n"] = 2
    with pytest.raises(OSError, match="No space left"):
        record.save()
    assert json.loads((tmp_path / "record.json").read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def _disk_full(path):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("content", "found"), [(None, "no record here"), ("{", "not a record"), ("[1]", "a list")])
def test_no_record_is_one_line_that_names_the_file(tmp_path, content, found):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(ConfigError, match=found) as error:
        Record.open(tmp_path)
    assert str(tmp_path / "record.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_that_json_lacks_become_null(tmp_path):
    values = {"a": float("nan"), "b": np.float32(0.5), "c": np.int64(3), "d": tmp_path, "e": (1, float("inf"))}
    Record(tmp_path / "record.json", values).save()
    assert Record.open(tmp_path).data == {"a": None, "b": 0.5, "c": 3, "d": str(tmp_path), "e": [1, None]}


@pytest.mark.parametrize(
    "key",
    ["api_key", "apiKey", "WANDB_API_KEY", "hf_token", "token", "db.password", "aws_secret_access_key", "API-KEY"],
)
def test_secret_keys(key):
    assert is_secret(key)
    assert redact({"logger": [{key: "abc"}]}) == {"logger": [{key: HIDDEN}]}
    assert redact({key: None}) == {key: None}  # that a key is not set is no secret


@pytest.mark.parametrize(
    "key", ["max_tokens", "tokens_per_second", "eos_token", "tokenizer_from", "key", "sort_key", "stop_token_ids"]
)
def test_keys_that_only_sound_secret(key):
    assert not is_secret(key)
    assert redact({key: "abc"}) == {key: "abc"}


@pytest.mark.parametrize(
    "text",
    [
        "python -m rotrl logger.api_key=SECRETVALUE",
        "python -m rotrl 'logger={mode: online, api_key: SECRETVALUE}'",
        "clone of https://me:SECRETVALUE@host/repo failed",
        "header Authorization: Bearer SECRETVALUE",
        "401 for hf_SECRETVALUE0123456789",
        "sk-SECRETVALUE0123456789 was refused",
    ],
)
def test_secrets_in_text(text):
    hidden = redact({"command": text})["command"]
    assert "SECRETVALUE" not in hidden
    assert HIDDEN in hidden


def test_prose_and_commands_stay_as_they_are():
    for text in ("python -m rotrl merge=ties merge.density=0.3", "the stop token: <eos>", "see http://host:80/a@b"):
        assert redact(text) == text


def test_values_of_secret_variables_are_hidden_wherever_they_appear(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    assert redact(["said correct-horse-battery twice"]) == [f"said {HIDDEN} twice"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def test_long_text_takes_linear_time():
    start = time.monotonic()
    redact({"log": "x" * 1_000_000, "b": "a-b." * 200_000, "c": "sk-" * 200_000})
    assert time.monotonic() - start < 5


@given(JSON)
def test_redacting_twice_changes_nothing_more_and_gives_json(value):
    once = redact(value)
    assert redact(once) == once
    json.dumps(once, allow_nan=False)


@given(st.from_regex(r"[A-Za-z0-9_-]{6,30}", fullmatch=True), JSON)
def test_no_value_of_a_secret_key_gets_through(secret, value):
    secret = f"Zq{secret}"
    shown = json.dumps(redact({"deep": [{"apiKey": secret, "x": f"run api_key={secret} y=1"}], "other": value}))
    assert secret not in shown or re.search(re.escape(secret), json.dumps(value))
