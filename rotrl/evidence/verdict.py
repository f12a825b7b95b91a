"""Verdicts in words: what the medians of kappa allow to be said, by thresholds that were fixed before the data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NOISE = "isotropic"
LACKING = {"none", "stretch"}


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
) -> dict[str, Any]:
    """{verdict, words, modules} of one expert: one side of all matrices, or of one module type, makes a rotation.

    `modules` lists the types that rotate where not all matrices together do.
    """
    pooled = {row["side"]: row for row in groups if row["module"] == "all"}
    if all(math.isnan(row["kappa_median"]) for row in pooled.values()):
        return {"verdict": "undecided", "words": f"{expert}: no matrix differs from the base", "modules": []}
    found = {row["verdict"] for row in pooled.values()}
    turning = [row for row in groups if row["verdict"] == "rotation"]
    modules = [] if "rotation" in found else list(dict.fromkeys(row["module"] for row in turning))
    if turning:
        verdict = "rotation"
    elif found <= LACKING:
        verdict = "none" if "none" in found else "stretch"
    else:
        verdict = "undecided"
    place = f" in {_names(modules)} alone" if modules else ""
    words = f"{expert}: {_MEANING[verdict]}{place}; {_numbers(pooled)}"
    noise = [c for c in controls if (c["expert"], c["control"], c["side"]) == (expert, NOISE, "right")]
    if noise:
        words += f" (noise {noise[0]['nu_median']:.2f})"
    planted = {side: row["fraction_median"] for side, row in pooled.items()}
    if not any(math.isnan(value) for value in planted.values()):
        told = ", ".join(f"{side} {value:.0%}" for side, value in planted.items())
        words += f"; the planted rotation energy that shows as much: {told}"
    return {"verdict": verdict, "words": words, "modules": modules}


def _numbers(pooled: Mapping[str, Mapping[str, Any]]) -> str:
    kappas = ", ".join(f"{side} {_interval(row)}" for side, row in pooled.items())
    shares = ", ".join(
        f"{side} {row['share_median']:.2f} (null {row['null_median']:.2f})" for side, row in pooled.items()
    )
    change = pooled["right"]["nu_median"]
    return f"median kappa {kappas}; share of the update explained {shares}; spectral change nu {change:.2f}"


_MEANING = {
    "rotation": "a rotation",
    "none": "no rotation",
    "stretch": "no rotation, a stretch rather",
    "undecided": "undecided",
}


def overall_verdict(experts: Mapping[str, Mapping[str, Any]], references: Sequence[str]) -> str:
    """One or two sentences over all experts; `references` are the models that were not tuned by RL."""
    verdicts = {name: found["verdict"] for name, found in experts.items() if name not in references}
    others = {name: experts[name]["verdict"] for name in references}
    rotations = [name for name, verdict in verdicts.items() if verdict == "rotation"]
    told = f" The references: {_told(others)}." if others else ""
    if not verdicts:
        return "Nothing to judge: every model is a reference."
    if not rotations and set(verdicts.values()) <= LACKING:
        text = f"No rotation: the updates of {_names(verdicts)} are no nearer to one than their own sign flips."
        if others and set(others.values()) <= LACKING:
            return f"{text} The same holds for {_names(others)}: nothing here is special to RL."
        return text + told
    if not rotations:
        return f"Undecided: {_told(verdicts)}; no update is a rotation by the stated threshold.{told}"
    text = f"Rotation in {_names([_placed(name, experts[name]) for name in rotations])}"
    if len(rotations) < len(verdicts):
        text += f", not shown in {_names([name for name in verdicts if name not in rotations])}"
    if not others:
        return f"{text}. Whether this is special to RL is open: no model tuned otherwise was measured beside."
    alike = [name for name, verdict in others.items() if verdict == "rotation"]
    if alike:
        return f"{text}. It shows in {_names(alike)} as well: it is not special to RL."
    return f"{text}. The references do not show it: {_told(others)}."


def _placed(name: str, found: Mapping[str, Any]) -> str:
    return f"{name} ({', '.join(found['modules'])} alone)" if found["modules"] else name


def _names(names: Any) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _told(verdicts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())


def _interval(row: Mapping[str, Any]) -> str:
    median, low, high = (round(row[key], 2) + 0.0 for key in ("kappa_median", "kappa_low", "kappa_high"))
    return f"{median:+.2f} ({low:+.2f} to {high:+.2f})"  # + 0.0 makes -0.0 a plain zero
