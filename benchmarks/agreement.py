"""The same merge by rotrl and by mergekit, in float32 on the tiny pair: python benchmarks/agreement.py PYTHON

PYTHON is that of an environment with mergekit. Prints, for each method that both have with the same meaning, the
distance between the two merges over the norm of the merged update, the largest over all tensors and that of all of
them. Random masks (dare, della) can't agree and are left out.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.merge.bind import bind
from rotrl.merge.engine import merge_state
from rotrl.zoo import zoo_path

EXPERTS = ("math", "code")
CONF = Path(__file__).parents[1] / "conf" / "merge"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
    "breadcrumbs": {"density": 0.9, "gamma": 0.01},
    "breadcrumbs_ties": {"density": 0.9, "gamma": 0.01},
    "arcee_fusion": {},
}
WITHOUT_BASE = ("linear", "karcher")
ALONE = ("arcee_fusion",)  # takes one expert there
WHY = {
    "slerp": "there linear for tensors whose cosine is above .9995",
    "breadcrumbs": "there counts are rounded down: one entry more or less in small tensors",
    "breadcrumbs_ties": "the same",
    "arcee_fusion": "there the KL of rows is rounded to float32, which alone moves the mask by as much",
}
OWN_WEIGHT = ("density", "gamma")  # of each model, in mergekit's configuration


def experts_of(name: str) -> tuple[str, ...]:
    return EXPERTS[:1] if name in ALONE else EXPERTS


def peer(python: str, name: str, folder: Path) -> Path:
    """The folder of mergekit's merge."""
    options = METHODS[name]
    each = {key: value for key, value in options.items() if key in OWN_WEIGHT}
    whole = {key: value for key, value in options.items() if key not in OWN_WEIGHT}
    weight = {} if name in ("slerp", "sce", "model_stock", "karcher", "arcee_fusion") else {"weight": 1.0}
    models = [{"model": str(zoo_path(expert)), "parameters": {**each, **weight}} for expert in experts_of(name)]
    content: dict[str, Any] = {"merge_method": name, "models": models, "parameters": whole, "dtype": "float32"}
    if name not in WITHOUT_BASE:
        content["base_model"] = str(zoo_path("base"))
    if name == "slerp":  # the first of its two models is called the base
        content["base_model"] = str(zoo_path(EXPERTS[0]))
    (folder / "peer.json").write_text(json.dumps(content))
    command = [str(Path(python).parent / "mergekit-yaml"), str(folder / "peer.json"), str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return folder / name


def distance(name: str, merged: Path) -> tuple[float, float]:
    base, experts = open_checkpoint(zoo_path("base")), {e: open_checkpoint(zoo_path(e)) for e in experts_of(name)}
    options = dict(OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")))  # type: ignore[call-overload]
    options |= {**METHODS[name], "scope": "all"} | ({"scale": 1.0} if "scale" in options else {})
    own, other = merge_state(base, experts, bind(options, experts_of(name))), open_checkpoint(merged)
    apart = {key: float((own[key].double() - other.read(key).double()).square().sum()) for key in base.tensors}
    moved = {key: float((own[key].double() - base.read(key).double()).square().sum()) for key in base.tensors}
    largest = max(math.sqrt(apart[key] / moved[key]) for key in base.tensors if moved[key])
    return largest, math.sqrt(sum(apart.values()) / sum(moved.values()))


def main(python: str) -> None:
    print(f"{'method':<20}{'largest':>12}{'all':>12}   |rotrl - mergekit| / |merged - base|")
    for name in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                largest, whole = distance(name, peer(python, name, Path(folder)))
                print(f"{name:<20}{largest:>12.1e}{whole:>12.1e}   {WHY.get(name, '')}", flush=True)
            except RuntimeError as error:
                print(f"{name:<20}   mergekit: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
