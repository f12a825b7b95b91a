"""What a lineage means for each family of merge methods, in a sentence each."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotrl.evidence.kinship import ORTHOGONAL

FAMILIES = ("linear", "task_arithmetic", "sparse", "spherical", "subspace", "rotation", "learned")


def consequences(verdict: str, pairs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{family: sentence}. `pairs` are the relations of lineage; the one that gives the verdict is spoken of."""
    pair = next((pair for pair in pairs if pair["verdict"] == verdict), None)
    if pair is None:
        return dict.fromkeys(FAMILIES, "one expert: the merge only scales its update")
    if verdict == "descendant":
        return _descendant(pair["parent"], pair["child"])
    if verdict == "identical":
        return dict.fromkeys(FAMILIES, "two of the models are copies: the merge only scales one update; leave one out")
    if verdict == "unrelated":
        told = "assumes training from one base, which does not hold: expect a broken model, and don't read its scores"
        return dict.fromkeys(FAMILIES, told)
    cosine = max((pair["cosine"] or 0.0 for pair in pairs), key=abs)
    return _siblings(cosine)


def _siblings(cosine: float) -> dict[str, str]:
    told = {
        "linear": "each update is scaled by its weight",
        "task_arithmetic": "the sum keeps both updates whole at scale 1; nothing is counted twice",
        "sparse": "signs agree by chance alone, so sign election keeps and drops entries at random",
        "spherical": "at updates this small next to the base it is the average",
        "subspace": "the experts' directions are distinct, as assumed",
        "rotation": "generators add; their order matters little at small angles",
        "learned": "distils each expert on its own samples; nothing is assumed",
    }
    if abs(cosine) < ORTHOGONAL:
        return told
    return told | {
        "task_arithmetic": f"what the experts share (cosine {cosine:.2f}) is counted once for each; use a lower scale",
        "sparse": "signs agree beyond chance where the experts share a direction",
        "subspace": "directions that the experts share are taken as one",
        "rotation": "shared generators add up, so common angles grow; use a lower scale",
    }


def _descendant(parent: str, child: str) -> dict[str, str]:
    rebase = f"take {child} - {parent} as the second task vector"
    return {
        "linear": f"keeps all of {parent}'s update and a part of what {child} added: a step back along one run",
        "task_arithmetic": f"counts {parent}'s update twice at scale 1; {rebase}",
        "sparse": f"signs agree because {child} inherited them, so election proves nothing; {rebase}",
        "spherical": f"moves along one training run, from {parent} to {child}; it joins no skills",
        "subspace": f"{parent}'s directions are in both subspaces, so their orthogonality does not hold; {rebase}",
        "rotation": f"sums turn twice by {parent}'s angles; the geodesic from {parent} to {child} is sound",
        "learned": f"sound, but its task-arithmetic start counts {parent}'s update twice; start from {child}",
    }
