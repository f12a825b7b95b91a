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
