"""What the lineage means for the chosen merges: who assumes siblings, and the experts as merges see them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rotrl.app.prepare import Prepared
from rotrl.checkpoint.canonical import canonicalize
from rotrl.checkpoint.folder import on_disk
from rotrl.checkpoint.rebase import rebase
from rotrl.merge.method import Method

# The family of consequences (rotrl.evidence.consequences) of a method, by the module that holds it.
FAMILIES = {
    "linear": "task_arithmetic",
    "regmean": "linear",
    "sparse": "sparse",
    "select": "sparse",
    "spherical": "spherical",
    "subspace": "subspace",
    "residual": "subspace",
    "on_top": "subspace",
}
ONE_PATH = ("geodesic", "geodesic_aligned", "extrapolation", "interpolation")  # sound whoever descends from whom


def family(method: Method) -> str | None:
    """None for a method that assumes nothing about its experts' descent."""
    if method.name in ONE_PATH:
        return None
    if method.name in ("linear", "learned"):
        return method.name
    return FAMILIES.get(method.function.__module__.rsplit(".", 1)[-1], "rotation")


def warnings(lineage: Mapping[str, Any], methods: Mapping[str, Method]) -> list[str]:
    """One sentence for each family of chosen merges whose assumption the lineage denies."""
    if lineage.get("verdict") in (None, "siblings"):
        return []
    labels: dict[str, list[str]] = {}
    for label, method in methods.items():
        if (kind := family(method)) and kind != "learned":
            labels.setdefault(kind, []).append(label)
    return [f"merge {', '.join(named)}: {lineage['consequences'][kind]}" for kind, named in labels.items()]


def parents(pairs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{child: its nearest parent} from the pairs of a lineage."""
    found: dict[str, tuple[float, str]] = {}
    for pair in pairs:
        if pair["verdict"] == "descendant":
            candidate = pair["norm_ab"], pair["parent"]
            found[pair["child"]] = min(found.get(pair["child"], candidate), candidate)
    return {child: parent for child, (_, parent) in found.items()}


def settled(prepared: Prepared, lineage: Mapping[str, Any]) -> tuple[Prepared, list[str]]:
    """The input with `vectors` as models.rebase and models.canonicalize want them, and notes that say so."""
    models, cache = prepared.cfg["models"], Path(prepared.cfg["cache_dir"])
    vectors, notes = dict(prepared.experts), []
    if models.get("canonicalize"):
        vectors = {name: on_disk(canonicalize(model, prepared.base), cache) for name, model in vectors.items()}
        notes.append("merges see every expert in the gauge nearest to the base (models.canonicalize)")
    rebased = models.get("rebase")
    if rebased is True:
        rebased = parents(lineage.get("pairs") or [])
        if not rebased:
            notes.append("models.rebase: no expert descends from another, so none is re-based")
    for child, parent in (rebased or {}).items():
        notes.append(f"merges take {child} - {parent} as the task vector of {child} (models.rebase)")
    pairs = (rebased or {}).items()
    made = {child: rebase(vectors[child], vectors[parent], prepared.base) for child, parent in pairs}
    return replace(prepared, vectors=vectors | made), notes
