"""What was published of the same variants of the same models."""

from importlib.resources import files
from pathlib import Path

import yaml

NAMES = {"vectors": "its singular vectors with the base's values"}


def published(base: Path, expert: Path) -> list[str]:
    """A sentence for each publication on this base and expert, which are known by the names of their folders."""
    told = []
    for entry in yaml.safe_load((files("rotrl.evidence") / "published.yaml").read_text(encoding="utf-8")):
        if _is(base, entry["base"]) and _is(expert, entry["expert"]):
            tasks = {key: scores for key, scores in entry.items() if isinstance(scores, dict)}
            told.append(f"Published ({entry['source']}): " + "; ".join(_scores(*item) for item in tasks.items()))
    return told


def _scores(task: str, scores: dict[str, float]) -> str:
    return f"{task} " + ", ".join(f"{NAMES.get(name, name)} {value:.2f} %" for name, value in scores.items())


def _is(path: Path, name: str) -> bool:
    """`DIR/NAME`, and the hub's cache `models--ORG--NAME/snapshots/COMMIT`."""
    return any(part.rpartition("--")[2].casefold() == name.casefold() for part in Path(path).parts)
