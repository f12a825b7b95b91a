"""What parts of an update gain, with intervals over problems, and whether the rotation gains more than its controls.

The gain of a part is KL(base) - KL(part), both to the expert. Random rotations of the same energy ask whether the sense
of the rotation matters; any part of D beats those, since it points along D. Projections of D on random directions of
the same planes, and random coordinates of D, ask at the same energy whether the rotation carries more of the skill
than another part of D would: all have to be beaten.

Directions drawn without regard to D gain nothing, on the tiny pair -3 to 0 % of the KL. "A random direction of the same
energy" that gains nearly as much as the rotation is a projection of D on a random direction, which is `plane` here.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rotrl.evidence.table import defined

JUDGED = {
    "random rotations": "random",
    "random directions of its planes": "plane",
    "random parts of the update": "part",
}
GAIN = ("gain_per_energy", "gain_low", "gain_high")
SCALED = "the whole update at a scale"
SWAPPED = {"vectors": "the expert's vectors with the base's values", "values": "the reverse"}
BESIDE = {**JUDGED, SCALED: "scaled"}
Array = NDArray[Any]


class Part(NamedTuple):
    """||part||^2 / ||D||^2, by problem the sum of KL over tokens and their number, and ||D - part||^2 / ||D||^2."""

    energy: float
    kl: list[float]
    tokens: list[float]
    taken: float = math.nan


class Gains:
    """All parts of one expert on the same problems and the same resamples of them; column 0 is the sample itself.

    `accuracy` holds more columns of the rows, where the parts were sampled too.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        *,
        samples: int,
        resamples: int,
        seed: int,
        accuracy: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.parts, self.samples, self.seed, self.accuracy = dict(parts), samples, seed, dict(accuracy or {})
        self.problems = len(parts["base"].tokens)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(self.problems, np.full(self.problems, 1 / self.problems), size=resamples)
        self.counts = np.concatenate([np.ones((1, self.problems)), drawn])
        self.tokens = self.counts @ np.array(parts["base"].tokens)

    @cached_property
    def kl(self) -> Mapping[str, Array]:
        """{part: nats a token in the sample and in every resample}; of drawn kinds the mean, draws resampled too."""
        found = dict(self._kl)
        rng = np.random.default_rng(self.seed)
        for kind, names in self._draws():
            draws = np.array([found[name] for name in names])
            chosen = rng.integers(len(names), size=draws.shape)
            chosen[:, 0] = range(len(names))
            found[kind] = np.take_along_axis(draws, chosen, 0).mean(0)
        return found

    @cached_property
    def _kl(self) -> Mapping[str, Array]:
        """Of every single part."""
        return {name: self.counts @ np.array(part.kl) / self.tokens for name, part in self.parts.items()}

    @cached_property
    def kl_of_these_draws(self) -> Mapping[str, Array]:
        """As kl, but with the draws as they are: what remains varies with the problems alone."""
        means = {kind: np.mean([self._kl[name] for name in names], axis=0) for kind, names in self._draws()}
        return {**self._kl, **means}

    def energy(self, part: str) -> float:
        return self._mean(part, "energy")

    def _mean(self, part: str, key: str) -> float:
        names = dict(self._draws()).get(part, [part])
        return float(np.mean([getattr(self.parts[name], key) for name in names]))

    def score(self, part: str, kl: Mapping[str, Array] | None = None) -> Array:
        """1 - kl / kl(base)."""
        kl = kl or self.kl
        return 1 - kl[part] / kl["base"]

    def ratio(self, part: str, other: str, kl: Mapping[str, Array] | None = None) -> Array:
        """Gain of a part for each unit of energy over that of another; infinite where the other gains nothing."""
        a, b = (self.score(name, kl) / self.energy(name) for name in (part, other))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(b > 0, a / b, np.where(a > b, np.inf, 0.0))

    def rows(self) -> Iterator[dict[str, Any]]:
        single = {name for _, names in self._draws() for name in names}
        for name in [name for name in self.kl if name not in single]:
            low, high = interval(self.score(name))
            yield {
                "part": name,
                "energy": defined(self.energy(name)),
                "taken": defined(self._mean(name, "taken")),
                "kl": float(self.kl[name][0]),
                "score": defined(self.score(name)[0]),
                "low": defined(low),
                "high": defined(high),
                **self._gain(name),
                **self._against_control(name),
                **self.accuracy.get(name, {}),
            }

    def _gain(self, name: str) -> dict[str, float | None]:
        """Nats a token that the part gains for each ||D||^2 of energy, with its interval."""
        gain = (self.kl["base"] - self.kl[name]) / (self.energy(name) or math.nan)
        return dict(zip(GAIN, map(defined, (float(gain[0]), *interval(gain))), strict=True))

    def _against_control(self, name: str) -> dict[str, Any]:
        """Score less that of the control that leaves out or adds as much, paired by problem."""
        control = f"{name}_control"
        if control not in self.parts:
            return {}
        difference = self.score(name) - self.score(control)
        ends = dict(zip(("difference_low", "difference_high"), map(defined, interval(difference)), strict=True))
        return {"control": control, "difference": defined(difference[0]), **ends}

    def _draws(self) -> list[tuple[str, list[str]]]:
        kinds = [(kind, [name for name in self.parts if name.rpartition("_")[0] == kind]) for kind in JUDGED.values()]
        return [(kind, names) for kind, names in kinds if names]


def interval(values: Array) -> tuple[float, float]:
    """95 % percentiles of the resamples, infinite ones included."""
    low, high = np.quantile(values[1:], [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def judge_expert(expert: str, gains: Gains, tight: float) -> dict[str, Any]:
    """{verdict, words, comparisons, samples, decided_by}: `decided_by` is how many samples would decide, if it is open.

    Each comparison: ratio of gains for each unit of energy, low, high, verdict. The worst of those in JUDGED counts.
    """
    if not gains.energy("tangent") > 0 or not gains.kl["base"][0] > 0:
        words = f"{expert}: its matrices do not differ from the base"
        return {"verdict": "undecided", "words": words, "comparisons": [], "samples": gains.samples, "decided_by": None}
    compared = [_compare(gains, label, other, tight) for label, other in BESIDE.items()]
    judged = [each for each in compared if each["against"] in JUDGED]
    verdict = worst(each["verdict"] for each in judged)
    needed = [each["decided_by"] for each in judged if each["verdict"] == "undecided"]
    decided_by = None if verdict != "undecided" or None in needed else max(needed)
    told = ", ".join(_told(gains, each) for each in compared)
    closed = f"{gains.score('tangent')[0]:.0%} of the KL to the expert"
    part = f"the tangent part ({gains.energy('tangent'):.0%} of the energy)"
    words = f"{expert} {verdict}: {part} closes {closed}; at the same energy {told}"
    if verdict == "undecided":
        enough = f"about {decided_by} samples would decide"
        more = "more draws of the controls are needed first" if decided_by is None else enough
        words += f"; {gains.samples} samples leave it open, {more}"
    return {
        "verdict": verdict,
        "words": words,
        "comparisons": [{key: _finite(value) for key, value in each.items()} for each in compared],
        "samples": gains.samples,
        "decided_by": decided_by,
    }


def _compare(gains: Gains, label: str, other: str, tight: float) -> dict[str, Any]:
    ratios = gains.ratio("tangent", other)
    ratio, (low, high) = float(ratios[0]), interval(ratios)
    verdict = "supported" if low > 1 else "refuted" if high < 1 + tight else "undecided"
    # Squared widths add: that of the draws stays, that of the problems falls with their number; the easier of the two
    # decisions is taken as the goal.
    ways = [gap for gap in (ratio - 1, 1 + tight - ratio) if gap > 0]
    half, sampled = (_half(values) for values in (ratios, gains.ratio("tangent", other, gains.kl_of_these_draws)))
    drawn = max(0.0, half**2 - sampled**2)
    room = max(ways) ** 2 - drawn if ways and math.isfinite(half) else math.nan
    factor = sampled**2 / room if room > 0 else math.nan
    decided_by = None if math.isnan(factor) else math.ceil(gains.samples * max(1.0, factor))
    return {"against": label, "ratio": ratio, "low": low, "high": high, "verdict": verdict, "decided_by": decided_by}


def _half(values: Array) -> float:
    low, high = interval(values)
    return (high - low) / 2


def worst(verdicts: Any) -> str:
    """refuted before undecided before supported."""
    found = set(verdicts)
    return next((verdict for verdict in ("refuted", "undecided", "supported") if verdict in found), "undecided")


def beside_controls(expert: str, gains: Gains) -> list[str]:
    """A sentence on swaps and one on restorations: what each leaves of the skill, and its control."""
    told: dict[str, list[str]] = {}
    for row in gains.rows():
        if "control" in row:
            kind = "singular vectors or values exchanged" if row["part"] in SWAPPED else "the base's vectors put back"
            other = gains.score(row["control"])[0]
            ends = ("difference", "difference_low", "difference_high")
            points = "{:+.1f} points, {:+.1f} to {:+.1f}".format(*(100 * (row[key] or 0.0) + 0.0 for key in ends))
            name = SWAPPED.get(row["part"], row["part"].replace("_", " ") + " %")
            told.setdefault(kind, []).append(f"{name} {row['score']:.1%}, control {other:.1%} ({points})")
    return [f"{expert}, {kind}, share of the KL closed: {'; '.join(each)}." for kind, each in told.items()]


def overall(judged: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """(verdict, sentences) of all experts together; where they differ it is undecided."""
    verdicts = {found["verdict"] for found in judged.values()}
    verdict = verdicts.pop() if len(verdicts) == 1 else "undecided"
    heads = {
        "supported": "Supported: tangent parts gain more than random rotations and other parts of the update do.",
        "refuted": "Refuted: tangent parts gain no more than as much energy elsewhere.",
        "undecided": "Undecided whether tangent parts gain more than as much energy elsewhere.",
    }
    scaled = [each for found in judged.values() for each in found["comparisons"] if each["against"] == SCALED]
    beaten = bool(scaled) and all(each["high"] is not None and each["high"] < 1 for each in scaled)
    more = (
        ["Yet the whole update scaled to that energy gains more: a rotation is not the best of it."] if beaten else []
    )
    return verdict, [heads[verdict], *more, *(f"{found['words']}." for found in judged.values())]


def _told(gains: Gains, compared: Mapping[str, Any]) -> str:
    text = f"{compared['against']} {gains.score(BESIDE[compared['against']])[0]:.0%}"
    if not all(math.isfinite(compared[key]) for key in ("ratio", "low", "high")):
        return text
    return text + " (ratio {ratio:.2f}, {low:.2f} to {high:.2f})".format(**compared)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
