"""Verdicts in words: what the medians of kappa allow to be said, by thresholds that were fixed before the data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NOISE = "isotropic"


class Thresholds(NamedTuple):
    """On the median of kappa and its bootstrap interval over layers."""

    rotation: float = 0.5
    none: float = 0.05

    @property
    def words(self) -> str:
        return (
            f"rotation if the median of kappa is above {self.rotation:g}; none if its interval lies within "
            f"+-{self.none:g}; stretch if it lies below -{self.none:g}; else undecided"
        )


def judge(median: float, low: float, high: float, thresholds: Thresholds) -> str:
    """rotation | none | stretch | undecided. No interval (a single layer, no update) leaves only the first or last."""
    if median > thresholds.rotation:
        return "rotation"
    if high < -thresholds.none:
        return "stretch"
    if -thresholds.none <= low and high <= thresholds.none:
        return "none"
    return "undecided"


def expert_verdict(
    expert: str, groups: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """{verdict, words} of one expert from its pooled rows: one side suffices for a rotation, both must lack it."""
    pooled = {row["side"]: row for row in groups if row["module"] == "all"}
    found = {row["verdict"] for row in pooled.values()}
    if all(row["kappa_median"] != row["kappa_median"] for row in pooled.values()):
        return {"verdict": "undecided", "words": f"{expert}: no matrix differs from the base"}
    if "rotation" in found:
        verdict = "rotation"
    elif found <= {"none", "stretch"}:
        verdict = "none" if "none" in found else "stretch"
    else:
        verdict = "undecided"
    kappas = ", ".join(f"{side} {_interval(row)}" for side, row in pooled.items())
    right = pooled["right"]
    noise = next((c for c in controls if (c["expert"], c["control"], c["side"]) == (expert, NOISE, "right")), None)
    shares = ", ".join(
        f"{side} {row['share_median']:.2f} (null {row['null_median']:.2f})" for side, row in pooled.items()
    )
    words = (
        f"{expert}: {_MEANING[verdict]}; median kappa {kappas}; share of the update explained {shares}; "
        f"spectral change {right['nu_median']:.2f}" + (f" (noise {noise['nu_median']:.2f})" if noise else "")
    )
    planted = {side: row["fraction_median"] for side, row in pooled.items()}
    if all(value == value for value in planted.values()):
        told = ", ".join(f"{side} {value:.0%}" for side, value in planted.items())
        words += f"; the planted rotation energy that shows as much: {told}"
    return {"verdict": verdict, "words": words}


_MEANING = {
    "rotation": "a rotation",
    "none": "no rotation",
    "stretch": "no rotation, a stretch rather",
    "undecided": "undecided",
}


def overall_verdict(experts: Mapping[str, Mapping[str, str]], references: Sequence[str]) -> str:
    """One or two sentences over all experts; `references` are the models that were not tuned by RL."""
    verdicts = {name: found["verdict"] for name, found in experts.items() if name not in references}
    others = {name: experts[name]["verdict"] for name in references}
    rotations = [name for name, verdict in verdicts.items() if verdict == "rotation"]
    if not verdicts:
        return "Nothing to judge: every model is a reference."
    if not rotations:
        lacking = {"none", "stretch"}
        if set(verdicts.values()) <= lacking:
            text = f"No rotation: the updates of {_names(verdicts)} are no nearer to one than their own sign flips."
            if others and set(others.values()) <= lacking:
                return f"{text} The same holds for {_names(others)}: nothing here is special to RL."
            return text + (f" The references: {_told(others)}." if others else "")
        told = f"Undecided: {_told(verdicts)}; no update is a rotation by the stated threshold."
        return told + (f" The references: {_told(others)}." if others else "")
    text = f"Rotation in {_names(rotations)}"
    if len(rotations) < len(verdicts):
        text += f", not shown in {_names([name for name in verdicts if name not in rotations])}"
    if not others:
        return f"{text}. Whether this is special to RL is open: no model tuned otherwise was measured beside."
    alike = [name for name, verdict in others.items() if verdict == "rotation"]
    if alike:
        return f"{text}. It shows in {_names(alike)} as well: it is not special to RL."
    return f"{text}. The references do not show it: {_told(others)}."


def _names(names: Any) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _told(verdicts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['kappa_median']:+.2f} ({row['kappa_low']:+.2f} to {row['kappa_high']:+.2f})"
