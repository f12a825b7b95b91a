"""A plan reads what is here and asks nobody for what is not."""

import socket
from pathlib import Path

import pytest


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
