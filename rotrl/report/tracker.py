"""W&B as a guarded sink: whatever becomes of it, the run ends as it would have, a few seconds later at most.

The run is written offline to run_dir/wandb by a process of its own; `mode=online` then sends it with `wandb sync`. So
what a server missed is on disk, and the same command sends it later. The record stays the truth.
"""

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rotrl.checkpoint.files import whole_file
from rotrl.report.redact import redact

LOG = logging.getLogger(__name__)
# What the child process may see. It writes offline and needs no key; sending does.
ENVIRONMENT = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "PYTHONPATH", "VIRTUAL_ENV"),
    *("SYSTEMROOT", "XDG_CONFIG_HOME", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_CONFIG_DIR"),
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
SENDING = (
    *("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "NO_PROXY", "no_proxy", *PROXIES),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)
# Else even an offline run tells the server how it went, and waits for ten seconds where packets are dropped.
FIXED = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
CONTENT = ("status", "config", "models", "lineage", "geometry", "align", "scores", "comparisons")
REACH = 3.0  # seconds to wait for the server to accept a connection


class TrackerError(Exception):
    """Logging failed; the message becomes a warning."""


def log(record: Mapping[str, Any], run_dir: Path, settings: Mapping[str, Any] | None) -> None:
    """Logs the run as conf/logger says: mode none, offline or online, project, entity, group, tags, timeout (seconds).

    Never raises for a fault of W&B or of the network: it warns, and says how to send the run later. What was logged
    before with the same content is not logged twice.
    """
    settings = settings or {}
    if settings.get("mode", "none") in ("none", "disabled"):
        return
    run_dir = Path(run_dir).resolve()
    deadline = time.monotonic() + float(settings.get("timeout") or 30)
    try:
        run = _offline(redact(record), run_dir, settings, deadline)
        if settings["mode"] == "online" and not run["sent"]:
            _send(run_dir, run, deadline)
    except Exception as error:  # a sink: no fault of it may end the run
        LOG.warning("wandb: %s", error)


def _offline(record: dict[str, Any], run_dir: Path, settings: Mapping[str, Any], deadline: float) -> dict[str, Any]:
    """Writes the offline run, unless the last one holds the same; gives what `wandb/logged.json` says of it."""
    content = {key: record.get(key) for key in CONTENT}
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    marker = run_dir / "wandb" / "logged.json"
    known = _marked(marker)
    if known.get("fingerprint") == fingerprint and (marker.parent / known["run"]).is_dir():
        return known
    task = {"record": record, "run_dir": str(run_dir), "settings": dict(settings), "id": fingerprint[:12]}
    command = [sys.executable, "-m", "rotrl.report.wandb_run"]
    answer = _run(command, json.dumps(task), _environment(run_dir, ENVIRONMENT), deadline)
    known = json.loads(answer.splitlines()[-1]) | {"fingerprint": fingerprint, "sent": False}
    _mark(marker, known)
    return known


def _send(run_dir: Path, run: dict[str, Any], deadline: float) -> None:
    folder = run_dir / "wandb" / run["run"]
    try:
        if not any(os.environ.get(key) for key in PROXIES):
            _reach(run["server"])
        environment = _environment(run_dir, (*ENVIRONMENT, *SENDING))
        del environment["WANDB_SILENT"]  # its errors are the warning's words
        _run([sys.executable, "-m", "wandb", "sync", str(folder)], "", environment, deadline)
    except (TrackerError, OSError) as error:
        raise TrackerError(f"not sent ({error}); the run is on disk, send it with: wandb sync {folder}") from error
    _mark(run_dir / "wandb" / "logged.json", run | {"sent": True})


def _reach(server: str) -> None:
    address = urlsplit(server)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=REACH).close()
    except OSError as error:
        raise TrackerError(f"{server} is not reachable: {error.strerror or error}") from error


def _run(command: Sequence[str], text: str, environment: Mapping[str, str], deadline: float) -> str:
    """stdout of a child in a session of its own, killed with all it started at the deadline."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
        start_new_session=True,
    )
    limit = max(deadline - time.monotonic(), 0.1)
    try:
        out, problems = child.communicate(text, timeout=limit)
    except subprocess.TimeoutExpired:
        raise TrackerError(f"no end after {limit:.0f} s, given up") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode:
        lines = [line.strip() for line in problems.splitlines() if line.strip()]
        raise TrackerError(redact(lines[-1]) if lines else f"exit code {child.returncode}")
    return out


def _environment(run_dir: Path, names: Sequence[str]) -> dict[str, str]:
    folder = run_dir / "wandb"
    places = {"WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
    return {name: os.environ[name] for name in names if name in os.environ} | places | FIXED


def _marked(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # nothing logged yet, or not to the end
        return {}


def _mark(path: Path, value: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value))
