"""One run: prepare, then evidence, align, merge, evaluate, report. Every stage ends in a file."""

import shlex
import time
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from rotrl.app.check import check_keys
from rotrl.errors import ConfigError


def main(cfg: DictConfig) -> None:
    settings = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    if settings["verify"] or settings["doctor"] or settings["job"]:
        check_keys(settings)
    if settings["verify"]:
        return verify(Path(settings["verify"]))
    if settings["doctor"]:
        from rotrl.app.doctor import doctor

        return doctor(settings)
    if settings["job"]:
        return stand_alone(settings)
    if settings["regrade"] or (settings["evaluation"] or {}).get("completions"):
        from rotrl.app.regrade import regrade

        check_keys(settings)
        return regrade(settings, typed(), run_dir_of(settings), command())
    if settings["plan_only"]:
        from rotrl.app.plan import show_plan

        return show_plan(settings, run_dir_of(settings))
    from rotrl.app.pipeline import run

    run(settings, run_dir_of(settings), command())


def command() -> str:
    """What the user typed; in a multirun, the command of this one job."""
    return " ".join(["python -m rotrl", *map(shlex.quote, typed())])


def typed() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def run_dir_of(settings: dict[str, Any]) -> Path | None:
    """The folder that the user or the multirun fixes; None lets the digest name it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        if settings["run_dir"]:
            raise ConfigError("run_dir is one folder and a multirun has many jobs; set hydra.sweep.dir=DIR instead")
        return Path(hydra.runtime.output_dir)
    return Path(settings["run_dir"]) if settings["run_dir"] else None


def verify(folder: Path) -> None:
    from rotrl.checkpoint.verify import verify as verify_checkpoint

    start = time.monotonic()
    manifest = verify_checkpoint(folder)
    print(f"{folder}: valid ({len(manifest['files'])} files, {time.monotonic() - start:.1f} s)")


def stand_alone(settings: dict[str, Any]) -> None:
    from hydra.utils import instantiate

    instantiate(settings["job"], _convert_="all")()
