"""Does the rotation in an update carry its skill? Parts of it, judged by KL to the expert on its own samples."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from rotrl.align.data import Rollout, load_rollouts
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.errors import ConfigError
from rotrl.evidence.bases import Bases
from rotrl.evidence.gain import GAIN, JUDGED, Gains, Part, beside_controls, judge_expert, overall
from rotrl.evidence.parts import Chosen, named_parts, sampled_parts, variant_of
from rotrl.evidence.published import published
from rotrl.evidence.restore import restorations
from rotrl.evidence.table import Work, write_table
from rotrl.evidence.trial import Trial, depths
from rotrl.values import Count, Positive, faults_of

ACCURACY = ["accuracy", "accuracy_low", "accuracy_high", "to_expert", "to_expert_low", "to_expert_high"]
COLUMNS = [
    "expert",
    "part",
    "energy",
    "taken",
    "kl",
    "score",
    "low",
    "high",
    *GAIN,
    "control",
    "difference",
    "difference_low",
    "difference_high",
    *ACCURACY,
]
Score = Callable[[str, str, Path, str], dict[str, float]]


def function(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    out: Path,
    *,
    rollouts: Mapping[str, Path] | None,
    seed: int = 0,
    side: Literal["small", "left", "right"] = "small",
    draws: Count = 5,
    swaps: bool = True,
    restore: Mapping[str, Sequence[Sequence[float]]] | None = None,
    doses: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25),
    problems: Count | None = None,
    max_tokens: Count | None = None,
    batch: Count = 32,
    bootstrap: Count = 2000,
    tight: Positive = 0.1,
    accuracy: bool = False,
    score: Score | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """KL(expert || variant) of every part of every expert's update; writes out/function.csv and gives the verdict.

    `rollouts` are the files that align reads. A variant changes the matrices of attention and MLP; everything else is
    the base's, but in the row non_matrix, which is the reverse. Columns: energy is ||part||^2 / ||D||^2 over the
    matrices, taken ||D - part||^2 / ||D||^2, kl in nats a token, score the share 1 - kl / kl(base) of the gap that the
    part closes, with low and high of a bootstrap over problems; gain_per_energy nats a token gained for the energy
    ||D||^2, with its interval; difference is the score less that of the control in
    the row, paired. Rows named by a dose: update_<t> is W0 + t D, rotation_<t> is R^t W0. With `accuracy`,
    `score(expert, part, folder, sha256)` gives the columns ACCURACY of one variant; each is written, scored, removed.
    Parts that are done are kept in out/function.work.jsonl until all are. Raises ConfigError, CheckpointError.
    """
    check({"side": side, "draws": draws, "swaps": swaps, "restore": restore, "doses": doses, "tight": tight})
    if accuracy and score is None:
        raise ConfigError("evidence.function.accuracy: no score is given, the callable that samples a variant")
    parts = named_parts(draws, swaps, restore, doses)
    check_family(base, experts)
    given = load_rollouts(experts, rollouts, max_tokens=max_tokens)
    samples = {name: _chosen(found, problems, seed) for name, found in given.items()}
    weights = {name: model.sha256 for name, model in {"": base, **experts}.items()}
    hashes = {name: file_sha256(Path(path)) for name, path in (rollouts or {}).items()}
    work = Work(out / "function.work.jsonl", [weights, hashes, seed, side, problems, max_tokens, list(parts)])
    bases = Bases(out / "bases")
    bases.reserve((base.tensors[key].shape for key in depths(base)), models=1 + len(experts))
    trials = [Trial(name, base, expert, side, seed, bases) for name, expert in experts.items()]
    sampled = sampled_parts(parts) if accuracy else {}
    step = _steps(len(trials) * (len(parts) + len(sampled)), progress)
    measured = {trial: _measure(trial, parts, samples[trial.name], work, batch, step) for trial in trials}
    found: dict[str, Gains] = {}
    for trial, values in measured.items():  # only now: the engine wants the memory that models took
        scores = _score(trial, parts, values, sampled, work, cast(Score, score), out / "variant", step)
        own = len(samples[trial.name])
        found[trial.name] = Gains(values, samples=own, resamples=bootstrap, seed=seed, accuracy=scores)
    rows = [{"expert": name, **row} for name, gains in found.items() for row in gains.rows()]
    write_table(out / "function.csv", COLUMNS, [{key: row.get(key) for key in COLUMNS} for row in rows])
    work.path.unlink(missing_ok=True)
    bases.remove()
    return {"rows": rows, **_verdict(found, base, experts, tight)}


def _measure(
    trial: Trial,
    parts: Mapping[str, Chosen],
    samples: list[Rollout],
    work: Work,
    batch: int,
    step: Callable[[], None],
) -> dict[str, Part]:
    """Energies and KL of every part of one expert."""
    measured: dict[str, Part] = {}
    for part, chosen in parts.items():
        key = f"{trial.name}/{part}"
        if key not in work.rows:
            work.add(key, [trial.measure(part, variant_of(chosen, measured), samples, batch)])
        measured[part] = Part(**work.rows[key][0])
        step()
    trial.release()
    return measured


def _score(
    trial: Trial,
    parts: Mapping[str, Chosen],
    measured: Mapping[str, Part],
    sampled: Mapping[str, str],
    work: Work,
    score: Score,
    folder: Path,
    step: Callable[[], None],
) -> dict[str, dict[str, float]]:
    """{row: accuracy} of the sampled parts, each a checkpoint for as long as it takes."""
    scores = {}
    for part, row in sampled.items():
        key = f"{trial.name}/{part}/accuracy"
        if key not in work.rows:
            with trial.on_disk(part, variant_of(parts[part], measured), folder) as sha256:
                work.add(key, [score(trial.name, part, folder, sha256)])
        scores[row] = work.rows[key][0]
        step()
    return scores


def _verdict(
    found: Mapping[str, Gains], base: Checkpoint, experts: Mapping[str, Checkpoint], tight: float
) -> dict[str, Any]:
    """The verdicts with the sentences that tell them, and the thresholds that they follow from."""
    judged = {name: judge_expert(name, gains, tight) for name, gains in found.items()}
    verdict, sentences = overall(judged)
    for name, gains in found.items():
        judged[name]["published"] = published(base.path, experts[name].path)
        sentences += [*beside_controls(name, gains), *judged[name]["published"]]
    told = (
        f"supported if the gain of the tangent part over that of {', of '.join(JUDGED)} at equal energy has an "
        f"interval above 1; refuted if one of these intervals ends below {1 + tight:g}; else undecided"
    )
    return {
        "experts": judged,
        "verdict": verdict,
        "words": " ".join(sentences),
        "sentences": sentences,
        "thresholds": {"words": told},
    }


def _steps(total: int, progress: Callable[[int, int], None] | None) -> Callable[[], None]:
    """What counts one more of the parts as done."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    return step


def _chosen(rollouts: list[Rollout], problems: int | None, seed: int) -> list[Rollout]:
    """The rollouts of `problems` problems, in an order that the seed fixes."""

    def rank(problem: str) -> str:
        return hashlib.sha256(f"{seed}/{problem}".encode()).hexdigest()

    kept = set(sorted({rollout.problem for rollout in rollouts}, key=rank)[:problems])
    return [rollout for rollout in rollouts if rollout.problem in kept]


def check(given: Mapping[str, Any]) -> None:
    """Raises ConfigError on keywords of `function` that it can't follow."""
    if faults := faults_of(function, given, "evidence.function"):
        raise ConfigError("; ".join(faults))
    restorations(given["restore"])
