"""From sums over entries to kinship: siblings, descendant, unrelated, identical, with reasons in words.

The thresholds are wide on purpose: RL siblings of different tasks show cosines of some hundredths, a child carries
1.0 of its parent's update, and independently trained networks have a cosine of about 0 as whole weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from rotrl.evidence.table import defined

ORTHOGONAL = 0.1  # cosine of two updates below which they share nothing that matters
CARRIED = 0.15  # distance from 1 of the part of its parent's update that a child carries
CONSISTENT = 0.75  # share of the parent's update that lies in tensors which are each carried so (within twice that)
INHERITED = 0.9  # share of the entries changed by the parent that the child holds bit for bit
RELATED = 0.5  # cosine of whole weights with the base's below which a model was not trained from it
SAME = "same weights"
Copies = Mapping[tuple[str, str], set[str]]  # (original, copy) -> SAME or the dtypes through which the copy went


@dataclass(frozen=True)
class Sums:
    """Over the entries of one tensor or more, with a = A - base and b = B - base."""

    entries: float = 0.0
    base2: float = 0.0
    a2: float = 0.0
    b2: float = 0.0
    ab: float = 0.0
    difference2: float = 0.0
    base_a: float = 0.0
    base_b: float = 0.0
    equal_a: float = 0.0  # entries where A equals the base
    equal_b: float = 0.0
    inherited: float = 0.0  # entries where A and B are equal and differ from the base

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))

    @property
    def swapped(self) -> "Sums":
        """A and B exchanged."""
        n, base2, a2, b2, ab, difference2, base_a, base_b, equal_a, equal_b, inherited = astuple(self)
        return Sums(n, base2, b2, a2, ab, difference2, base_b, base_a, equal_b, equal_a, inherited)

    @property
    def cosine(self) -> float:
        """Of the two updates."""
        return _ratio(self.ab, math.sqrt(self.a2 * self.b2))

    @property
    def carried(self) -> float:
        """The part of A's update that B holds: 1 for a child of A whose own update is orthogonal."""
        return _ratio(self.ab, self.a2)

    @property
    def inherited_share(self) -> float:
        return _ratio(self.inherited, self.entries - self.equal_a)

    @property
    def cosine_with_base(self) -> float:
        """Of the whole weights of A."""
        return _ratio(self.base2 + self.base_a, math.sqrt(self.base2 * (self.base2 + 2 * self.base_a + self.a2)))


@dataclass
class Kinship:
    """What is known of a pair: sums by tensor, and over the matrices of attention and MLP."""

    tensors: list[Sums] = field(default_factory=list)
    matrices: Sums = field(default_factory=Sums)

    def add(self, sums: Sums, *, matrix: bool) -> None:
        self.tensors.append(sums)
        if matrix:
            self.matrices += sums

    @property
    def total(self) -> Sums:
        return sum(self.tensors, Sums())

    @property
    def swapped(self) -> "Kinship":
        return Kinship([sums.swapped for sums in self.tensors], self.matrices.swapped)


def origin(name: str, kin: Kinship, copies: Copies) -> dict[str, Any]:
    """How the A of `kin` relates to the base: descendant, identical (a copy) or unrelated."""
    total = kin.total
    cosine = (kin.matrices if kin.matrices.entries else total).cosine_with_base
    relative = math.sqrt(_ratio(total.a2, total.base2))
    outside = _ratio(total.a2 - kin.matrices.a2, total.a2)
    verdict, words = "descendant", f"{name} moved from the base by {relative:.2%} of its norm"
    if copy := _copy("base", name, copies):
        verdict, words = "identical", copy
    elif not cosine >= RELATED:
        verdict = "unrelated"
        words = f"{name} was not trained from this base: the cosine of their weights is {cosine:.2f}"
    elif outside > 0.005:
        words += f", {outside:.0%} of the update's energy outside the matrices of attention and MLP"
    return {
        "verdict": verdict,
        "words": words,
        "relative_norm": defined(relative),
        "cosine": defined(cosine),
        "outside_matrices": defined(outside),
        "unchanged": total.equal_a / total.entries,
    }


def relate(a: str, b: str, kin: Kinship, origins: Mapping[str, Mapping[str, Any]], copies: Copies) -> dict[str, Any]:
    """The relation of two experts; `parent` and `child` are set for a descendant."""
    total = kin.total
    verdict, words, parent, child = "siblings", "", None, None
    if copy := _copy(a, b, copies):
        verdict, words = "identical", copy
    elif strange := [name for name in (a, b) if origins[name]["verdict"] != "descendant"]:
        verdict, words = origins[strange[0]]["verdict"], "; ".join(origins[name]["words"] for name in strange)
    elif found := _parent(a, b, kin):
        verdict, (parent, child, view) = "descendant", found
        words = (
            f"{child} descends from {parent}: it carries {view.carried:.2f} of {parent}'s update (a sibling about 0) "
            f"and differs from {parent} by {_squared(view):.2f} of what siblings would"
        )
        if view.inherited_share > ORTHOGONAL:
            words += f"; {view.inherited_share:.0%} of the entries that {parent} changed are the same bits in {child}"
        further = math.sqrt(_ratio(view.difference2, view.a2))
        words += (
            f"; so {child} is {parent} trained on, moved by {further:.2f} of {parent}'s update: to be as good at "
            f"{parent}'s tasks, or better, {child} needs no merge"
        )
    elif abs(total.cosine) < ORTHOGONAL:
        words = (
            f"{a} and {b} are siblings: the cosine of their updates is {total.cosine:.2f}, and their squared distance "
            f"is {_squared(total):.2f} of the sum of their squared updates"
        )
    else:
        words = (
            f"{a} and {b} are siblings with a common direction: the cosine of their updates is {total.cosine:.2f}, but "
            f"neither carries the whole update of the other ({total.carried:.2f}, {total.swapped.carried:.2f})"
        )
    norms = {"norm_a": total.a2, "norm_b": total.b2, "norm_ab": total.difference2}
    return {
        "a": a,
        "b": b,
        **{key: math.sqrt(value) for key, value in norms.items()},
        "cosine": defined(total.cosine),
        "carried_a": defined(total.carried),
        "carried_b": defined(total.swapped.carried),
        "inherited": defined(total.inherited_share),
        "verdict": verdict,
        "parent": parent,
        "child": child,
        "words": words,
    }


def overall(pairs: Sequence[Mapping[str, Any]], origins: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """The gravest verdict and all words: unrelated, then identical, descendant, siblings."""
    if not pairs:
        alone = [found["verdict"] for found in origins.values() if found["verdict"] != "descendant"]
        words = "; ".join(found["words"] for found in origins.values()) or "no expert is given"
        return (alone[0] if alone else "siblings"), words
    found = {pair["verdict"] for pair in pairs}
    verdict = next(v for v in ("unrelated", "identical", "descendant", "siblings") if v in found)
    return verdict, "; ".join(dict.fromkeys(pair["words"] for pair in pairs))


def _parent(a: str, b: str, kin: Kinship) -> tuple[str, str, Sums] | None:
    """(parent, child, sums with the parent as A) if one of the two carries the other's whole update."""
    views = [(a, b, kin), (b, a, kin.swapped)]
    found = [(parent, child, view.total) for parent, child, view in views if _carries(view)]
    return min(found, key=lambda candidate: candidate[2].a2, default=None)


def _carries(kin: Kinship) -> bool:
    total = kin.total
    whole = sum(sums.a2 for sums in kin.tensors if sums.a2 and abs(sums.carried - 1) <= 2 * CARRIED)
    by_projection = abs(total.carried - 1) <= CARRIED and whole >= CONSISTENT * total.a2
    return by_projection or total.inherited_share >= INHERITED


def _copy(a: str, b: str, copies: Copies) -> str | None:
    if SAME in copies[a, b]:
        return f"{b} holds the same weights as {a}"
    for original, copy in ((a, b), (b, a)):
        if kinds := copies[original, copy]:
            return f"{copy} is a {sorted(kinds)[0]} copy of {original}"
    return None


def _squared(sums: Sums) -> float:
    return _ratio(sums.difference2, sums.a2 + sums.b2)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
