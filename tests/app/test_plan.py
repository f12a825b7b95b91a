"""A plan reads what is here and asks nobody for what is not."""

import socket
from pathlib import Path

import pytest

from rotrl.checkpoint.reader import Checkpoint


def test_a_plan_leaves_the_network_alone(typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def resolve(host: object, *_: object, **__: object) -> list[object]:
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, told = typed("plan_only=true", "models.base=org/model", "evaluation=math", "evidence=none", "align=none")
    assert (code, told) == (0, "")
    assert asked == []


def test_a_fault_counts_more_than_a_model_that_is_not_here(typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    given = ("models.base=org/model", "evidence=none", "align=none", "evaluation=tiny", "evaluation.select=[aime]")
    code, told = typed("plan_only=true", *given)
    assert code == 2
    assert "org/model is neither in the hub's cache nor reachable" in told
    assert "evaluation.select is ['aime']; name some of" in told


def test_a_task_that_can_not_be_read_counts_more_than_a_model_that_is_not_here(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "own.jsonl").write_text('{"id": "a"}\n')
    given = ("plan_only=true", "models.base=org/model", "evidence=none", "align=none")
    code, told = typed(*given, "evaluation=custom", "evaluation.path=own.jsonl")
    assert code == 2
    assert "own.jsonl, line 1" in told
    assert typed(*given, "evaluation=math") == (0, "")  # whose problems are not here either


def test_a_plan_reads_no_weights(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint, "sha256", property(lambda model: pytest.fail(f"{model.path} was read")))
    assert typed("plan_only=true", "evidence=none", "align=none", "merge=linear", "evaluation=none") == (0, "")
