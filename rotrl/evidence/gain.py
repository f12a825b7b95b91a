"""What parts of an update gain, with intervals over problems, and whether the rotation gains more than its controls.

The gain of a part is KL(base) - KL(part), both to the expert. Random rotations of the same energy ask whether the sense
of the rotation matters; any part of D beats those, since it points along D. Random coordinates of D with the same
energy ask whether the rotation carries more of the skill than another part of D would: both have to be beaten.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rotrl.evidence.table import defined

JUDGED = {"random rotations": "random", "random parts of the update": "part"}
SCALED = "the whole update at a scale"
BESIDE = {**JUDGED, SCALED: "scaled"}
Array = NDArray[Any]


class Part(NamedTuple):
    """||part||^2 / ||D||^2, and by problem the sum of KL over tokens and their number."""

    energy: float
    kl: list[float]
    tokens: list[float]


class Gains:
    """All parts of one expert on the same problems and the same resamples of them; column 0 is the sample itself."""

    def __init__(self, parts: Mapping[str, Part], *, samples: int, resamples: int, seed: int) -> None:
        self.parts, self.samples, self.seed = dict(parts), samples, seed
        self.problems = len(parts["base"].tokens)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(self.problems, np.full(self.problems, 1 / self.problems), size=resamples)
        self.counts = np.concatenate([np.ones((1, self.problems)), drawn])
        self.tokens = self.counts @ np.array(parts["base"].tokens)

    @cached_property
    def kl(self) -> Mapping[str, Array]:
        """{part: nats a token in the sample and in every resample}; of drawn kinds the mean, draws resampled too."""
        found = {name: self.counts @ np.array(part.kl) / self.tokens for name, part in self.parts.items()}
        rng = np.random.default_rng(self.seed)
        for kind, names in self._draws():
            draws = np.array([found[name] for name in names])
            chosen = rng.integers(len(names), size=draws.shape)
            chosen[:, 0] = range(len(names))
            found[kind] = np.take_along_axis(draws, chosen, 0).mean(0)
        return found

    def energy(self, part: str) -> float:
        names = dict(self._draws()).get(part, [part])
        return float(np.mean([self.parts[name].energy for name in names]))

    def score(self, part: str) -> Array:
        """1 - kl / kl(base)."""
        return 1 - self.kl[part] / self.kl["base"]

    def ratio(self, part: str, other: str) -> Array:
        """Gain of a part for each unit of energy over that of another; infinite where the other gains nothing."""
        a, b = (self.score(name) / self.energy(name) for name in (part, other))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(b > 0, a / b, np.where(a > b, np.inf, 0.0))

    def rows(self) -> Iterator[dict[str, Any]]:
        single = {name for _, names in self._draws() for name in names}
        for name in [name for name in self.kl if name not in single]:
            low, high = interval(self.score(name))
            yield {
                "part": name,
                "energy": defined(self.energy(name)),
                "kl": float(self.kl[name][0]),
                "score": defined(self.score(name)[0]),
                "low": defined(low),
                "high": defined(high),
                "gain_per_energy": defined((self.kl["base"] - self.kl[name])[0] / (self.energy(name) or math.nan)),
            }

    def _draws(self) -> list[tuple[str, list[str]]]:
        kinds = [(kind, [name for name in self.parts if name.rpartition("_")[0] == kind]) for kind in JUDGED.values()]
        return [(kind, names) for kind, names in kinds if names]


def interval(values: Array) -> tuple[float, float]:
    """95 % percentiles of the resamples, infinite ones included."""
    low, high = np.quantile(values[1:], [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def judge_expert(expert: str, gains: Gains, tight: float) -> dict[str, Any]:
    """{verdict, words, comparisons, samples, decided_by}: `decided_by` is how many samples would decide, if it is open.

    Each comparison: ratio of gains for each unit of energy, low, high, verdict. The worst of the two in JUDGED counts.
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
    words = (
        f"{expert} {verdict}: the tangent part ({gains.energy('tangent'):.0%} of the energy) closes {closed}; {told}"
    )
    if verdict == "undecided":
        more = "no number of samples is in sight that" if decided_by is None else f"about {decided_by} samples"
        words += f"; {gains.samples} samples leave it open, {more} would decide"
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
    half, ways = (high - low) / 2, [gap for gap in (ratio - 1, 1 + tight - ratio) if gap > 0]
    # Half the width falls with the root of the problems; the easier of the two decisions is taken as the goal.
    factor = (half / max(ways)) ** 2 if ways and math.isfinite(half) else math.nan
    decided_by = None if math.isnan(factor) else math.ceil(gains.samples * max(1.0, factor))
    return {"against": label, "ratio": ratio, "low": low, "high": high, "verdict": verdict, "decided_by": decided_by}


def worst(verdicts: Any) -> str:
    """refuted before undecided before supported."""
    found = set(verdicts)
    return next((verdict for verdict in ("refuted", "undecided", "supported") if verdict in found), "undecided")


def overall(judged: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """(verdict, words) of all experts together; where they differ it is undecided."""
    verdicts = {found["verdict"] for found in judged.values()}
    verdict = verdicts.pop() if len(verdicts) == 1 else "undecided"
    heads = {
        "supported": "Supported: tangent parts gain more than random rotations and random parts of the update do.",
        "refuted": "Refuted: tangent parts gain no more than as much energy elsewhere.",
        "undecided": "Undecided whether tangent parts gain more than as much energy elsewhere.",
    }
    scaled = [each for found in judged.values() for each in found["comparisons"] if each["against"] == SCALED]
    beaten = bool(scaled) and all(each["high"] is not None and each["high"] < 1 for each in scaled)
    more = (
        ["Yet the whole update scaled to that energy gains more: a rotation is not the best of it."] if beaten else []
    )
    return verdict, " ".join([heads[verdict], *more, *(f"{found['words']}." for found in judged.values())])


def _told(gains: Gains, compared: Mapping[str, Any]) -> str:
    text = f"{compared['against']} of that energy {gains.score(BESIDE[compared['against']])[0]:.0%}"
    if not all(math.isfinite(compared[key]) for key in ("ratio", "low", "high")):
        return text
    return text + " (ratio {ratio:.2f}, {low:.2f} to {high:.2f})".format(**compared)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
