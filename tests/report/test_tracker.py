import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from rotrl.report import figures, html, tracker
from rotrl.report.wandb_run import summary

CONF = Path(__file__).parents[2] / "conf" / "logger"
OFFLINE = yaml.safe_load((CONF / "offline.yaml").read_text())
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server():
    """A server that takes connections and never answers; `seen` are the requests."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen, held = [], []

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            threading.Thread(target=lambda c: seen.append(c.recv(4096)), args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    listener.close()
    for connection in held:
        connection.close()


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """No credentials or settings but those of the test."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def inspected(run_dir):
    (run,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def contents(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_offline_run_holds_all_of_it_and_no_secret(full, monkeypatch, server):
    record, run_dir = full
    address, seen = server
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    figures.draw(record, run_dir)
    html.render(record, run_dir)
    start = time.monotonic()
    tracker.log(record, run_dir, OFFLINE)
    assert time.monotonic() - start < 15  # 2 s on an idle machine
    assert seen == []  # offline is offline
    found = inspected(run_dir)
    assert found["state"] == "finished"
    assert found["exit_code"] == 0
    assert found["project"] == "rotrl"
    assert found["config"]["seed"] == 0
    for key, value in summary(record).items():
        assert found["summary"][key] == (pytest.approx(value) if isinstance(value, float) else value)
    for name, rows in (
        ("scores", record["scores"]),
        ("comparisons", record["comparisons"]),
        ("merges", record["merges"]),
    ):
        assert found["summary"][name]["nrows"] == len(rows)
    pictures = [key for key in found["summary"] if key.startswith("figures/")]
    assert len(pictures) == 5
    assert found["summary"]["report"]["_type"] == "html-file"
    assert found["summary"]["align/kl_math"] == pytest.approx(record["align"]["curve"][-1]["kl_math"])
    written = contents(run_dir / "wandb")
    assert b"hunter2" not in written
    assert KEY.encode() not in written


def test_the_same_content_is_logged_once(failed):
    record, run_dir = failed
    tracker.log(record, run_dir, OFFLINE)
    start = time.monotonic()
    tracker.log({**record, "finished": "later"}, run_dir, OFFLINE)
    assert time.monotonic() - start < 0.5
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1


def test_none_writes_nothing(full):
    record, run_dir = full
    tracker.log(record, run_dir, yaml.safe_load((CONF / "none.yaml").read_text()))
    tracker.log(record, run_dir, None)
    assert not (run_dir / "wandb").exists()


def test_an_unreachable_server_costs_seconds_and_a_warning(failed, monkeypatch, caplog):
    record, run_dir = failed
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    start = time.monotonic()
    tracker.log(record, run_dir, OFFLINE | yaml.safe_load((CONF / "wandb.yaml").read_text()))
    assert time.monotonic() - start < 15
    assert "not reachable" in caplog.text
    assert f"wandb sync {run_dir / 'wandb' / 'offline-run-'}" in caplog.text
    assert inspected(run_dir)["state"] == "finished"


def test_a_server_that_never_answers_is_given_up_and_leaves_no_process(failed, monkeypatch, caplog, server):
    record, run_dir = failed
    address, _ = server
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker.log(record, run_dir, OFFLINE)
    start = time.monotonic()
    tracker.log(record, run_dir, OFFLINE | {"mode": "online", "timeout": 5})
    assert 4 < time.monotonic() - start < 12
    assert "given up" in caplog.text
    assert "wandb sync" in caplog.text
    wait_until(lambda: not holding(run_dir))
    assert KEY.encode() not in contents(run_dir / "wandb")


def holding(run_dir):
    """Processes whose environment names the run folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(run_dir).encode() in (process / "environ").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_missing_key_is_said_in_one_line(failed, monkeypatch, caplog, server):
    record, run_dir = failed
    monkeypatch.setenv("WANDB_BASE_URL", server[0])
    tracker.log(record, run_dir, OFFLINE | {"mode": "online"})
    (entry,) = caplog.records
    assert entry.levelno == logging.WARNING
    assert "No API key" in entry.message
    assert "\n" not in entry.message


def test_a_folder_that_cannot_be_written_is_a_warning(failed, caplog):
    record, run_dir = failed
    (run_dir / "wandb").write_text("a file in the way")
    tracker.log(record, run_dir, OFFLINE)
    assert "wandb:" in caplog.text


def test_a_torn_marker_is_written_anew(failed, caplog):
    record, run_dir = failed
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb" / "logged.json").write_text('{"finger')
    tracker.log(record, run_dir, OFFLINE)
    assert inspected(run_dir)["state"] == "finished"
    assert caplog.text == ""
