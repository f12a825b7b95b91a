"""Which parts of an update are tried, by name: the rows of function.csv before draws of one kind are joined."""

from collections.abc import Iterator, Mapping, Sequence

from rotrl.evidence.gain import Part
from rotrl.evidence.restore import Span, left_out, restorations
from rotrl.evidence.variants import DRAWN, SINGLE, SWAPS, Variant, dose, nothing, whole

# None: everything but the matrices. A name: what lacks as much of D as that part does, at random places.
Chosen = Variant | str | None


def named_parts(
    draws: int, swaps: bool, restore: Mapping[str, Sequence[Span]] | None, doses: Sequence[float]
) -> dict[str, Chosen]:
    """{name: part}, those that others refer to first. Raises ConfigError on ranges that restore can't follow."""
    return dict(_parts(draws, swaps, restorations(restore), doses))


def _parts(
    draws: int, swaps: bool, restored: Mapping[str, Variant], doses: Sequence[float]
) -> Iterator[tuple[str, Chosen]]:
    yield from (("base", nothing), ("matrices", whole), ("non_matrix", None))
    yield from SINGLE.items()
    yield from ((f"{name}_{i}", variant) for name, variant in DRAWN.items() for i in range(draws))
    yield from SWAPS.items() if swaps else ()
    for name, variant in restored.items():
        yield name, variant
        yield f"{name}_control", name
    for t in doses:
        yield f"update_{t:g}", dose(t, rotated=False)
        yield f"rotation_{t:g}", dose(t, rotated=True)


def variant_of(chosen: Chosen, measured: Mapping[str, Part]) -> Variant | None:
    """The variant; of a control, once the part that it controls for is measured."""
    return left_out(measured[chosen].energy, measured[chosen].taken) if isinstance(chosen, str) else chosen


def sampled_parts(parts: Mapping[str, Chosen]) -> dict[str, str]:
    """{part: the name of its row}: of every kind of draw the first."""
    return {part: kind_of(part) or part for part in parts if not kind_of(part) or part.endswith("_0")}


def kind_of(part: str) -> str:
    """Which kind of random draw a part is one of; empty for all others."""
    kind = part.rpartition("_")[0]
    return kind if kind in DRAWN else ""
