"""The tiny pair: a base, two RL experts and two SFT controls that ship with the package, and how they were made."""

from pathlib import Path

from rotrl.errors import ConfigError

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def zoo_path(name: str) -> Path:
    """Folder of the packaged checkpoint `name` (base, math, code, math_sft or code_sft)."""
    folder = CHECKPOINTS / name
    if not (folder / "config.json").is_file():
        names = ", ".join(sorted(p.parent.name for p in CHECKPOINTS.glob("*/config.json")))
        raise ConfigError(f"zoo model '{name}': no such packaged checkpoint; choose one of {names}")
    return folder
