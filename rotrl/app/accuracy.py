"""Accuracy of one variant of an expert, for the evidence: it may not know of the evaluation, so it is handed this."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotrl.app.prepare import Prepared

SANDBOX = {"minimum": "landlock", "allow_unsandboxed": False}


def accuracy_of(
    models: Prepared, cfg: Mapping[str, Any], expert: str, part: str, folder: Path, sha256: str
) -> dict[str, float]:
    """avg@n on the problems that the expert was sampled on, and the difference to the expert, paired by problem."""
    from rotrl.evaluate.run import evaluate

    variant = f"{expert}/{part}"  # neither "base" nor the name of an expert
    with tempfile.TemporaryDirectory() as out:
        found = evaluate(
            {"base": models.base.path, expert: models.experts[expert].path, variant: folder},
            [models.prompts[expert]],
            protocol=cfg["protocol"],
            engine=cfg["engine"],
            sandbox=(cfg["evaluation"] or {}).get("sandbox") or SANDBOX,
            roles={"base": "base", expert: "expert", variant: "merge"},
            weights={"base": models.weights["base"], expert: models.weights[expert], variant: sha256},
            cache=Path(cfg["cache_dir"]),
            out=Path(out),
            seed=cfg["seed"],
        )
    row = next(row for row in found["scores"] if row["model"] == variant and row["metric"].startswith("avg@"))
    paired = next(row for row in found["comparisons"] if (row["a"], row["b"]) == (variant, expert))
    return {
        "accuracy": row["value"],
        "accuracy_low": row["low"],
        "accuracy_high": row["high"],
        "to_expert": paired["difference"],
        "to_expert_low": paired["low"],
        "to_expert_high": paired["high"],
    }
