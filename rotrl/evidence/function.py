"""Does the rotation in an update carry its skill? Parts of it, judged by KL to the expert on its own samples."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rotrl.align.data import Rollout, load_rollouts
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.errors import CheckpointError, ConfigError
from rotrl.evidence.divergence import Divergence, load_model
from rotrl.evidence.gain import JUDGED, Gains, Part, judge_expert, overall
from rotrl.evidence.nulls import seeded
from rotrl.evidence.table import Work, write_table
from rotrl.evidence.variants import DRAWN, SINGLE, SWAPS, Matrix, Variant, dose, nothing, whole
from rotrl.linalg.spectrum import basis

COLUMNS = ["expert", "part", "energy", "kl", "score", "low", "high"]
KEPT = 1 << 26  # entries of matrices up to which their singular bases stay in memory; beyond, each is made again


def function(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    out: Path,
    *,
    rollouts: Mapping[str, Path] | None,
    seed: int = 0,
    side: str = "small",
    draws: int = 5,
    swaps: bool = True,
    doses: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25),
    problems: int | None = None,
    max_tokens: int | None = None,
    batch: int = 32,
    bootstrap: int = 2000,
    tight: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """KL(expert || variant) of every part of every expert's update; writes out/function.csv and gives the verdict.

    `rollouts` are the files that align reads. A variant changes the matrices of attention and MLP; everything else is
    the base's, but in the row non_matrix, which is the reverse. Columns: energy is ||part||^2 / ||D||^2 over the
    matrices, kl in nats a token, score the share 1 - kl / kl(base) of the gap that the part closes, with low and high
    of a bootstrap over problems. Rows named by a dose: update_<t> is W0 + t D, rotation_<t> is R^t W0.
    Parts that are done are kept in out/function.work.jsonl until all are. Raises ConfigError, CheckpointError.
    """
    _check(side, draws, tight)
    check_family(base, experts)
    samples = load_rollouts(experts, rollouts, max_tokens=max_tokens)
    samples = {name: _chosen(given, problems, seed) for name, given in samples.items()}
    parts = list(_parts(draws, swaps, doses))
    weights = {name: model.sha256 for name, model in {"": base, **experts}.items()}
    hashes = {name: file_sha256(Path(path)) for name, path in (rollouts or {}).items()}
    work = Work(out / "function.work.jsonl", [weights, hashes, seed, side, problems, max_tokens, [p for p, _ in parts]])
    found: dict[str, Gains] = {}
    for number, (name, expert) in enumerate(experts.items()):
        run = _Run(name, base, expert, samples[name], side, seed, batch)
        measured = {}
        for done, (part, variant) in enumerate(parts):
            key = f"{name}/{part}"
            if key not in work.rows:
                work.add(key, [run.measure(part, variant)])
            measured[part] = Part(**work.rows[key][0])
            if progress:
                progress(number * len(parts) + done + 1, len(experts) * len(parts))
        found[name] = Gains(measured, samples=len(samples[name]), resamples=bootstrap, seed=seed)
    rows = [{"expert": name, **row} for name, gains in found.items() for row in gains.rows()]
    write_table(out / "function.csv", COLUMNS, [{key: row[key] for key in COLUMNS} for row in rows])
    work.path.unlink()
    judged = {name: judge_expert(name, gains, tight) for name, gains in found.items()}
    verdict, words = overall(judged)
    told = (
        f"supported if the gain of the tangent part over that of {' and of '.join(JUDGED)} at equal energy has an "
        f"interval above 1; refuted if one of these intervals ends below {1 + tight:g}; else undecided"
    )
    return {"rows": rows, "experts": judged, "verdict": verdict, "words": words, "thresholds": {"words": told}}


class _Run:
    """One expert: what a variant's weights are, put into one model in memory. Models are loaded when first needed."""

    def __init__(
        self, name: str, base: Checkpoint, expert: Checkpoint, rollouts: list[Rollout], side: str, seed: int, batch: int
    ) -> None:
        self.name, self.base, self.expert, self.side, self.seed = name, base, expert, side, seed
        self.rollouts, self.batch = rollouts, batch
        roles = {key: role_of(key, info.shape) for key, info in base.tensors.items()}
        self.matrices = [key for key, role in roles.items() if role.is_matrix]
        if not self.matrices:
            raise CheckpointError(
                f"{base.path}: no tensor is named like a matrix of attention or MLP (..._proj.weight)"
            )
        self.others = [key for key in base.tensors if key not in self.matrices]
        size = sum(base.tensors[key].shape[0] * base.tensors[key].shape[1] for key in self.matrices)
        self.kept: dict[str, Matrix] | None = {} if size <= KEPT else None
        self.divergence: Divergence | None = None

    def measure(self, part: str, variant: Variant | None) -> dict[str, Any]:
        """Energy of a part and KL of the model that has it, by problem. Without a variant: all but the matrices."""
        if self.divergence is None:
            self.divergence = Divergence(self.expert, self.rollouts, batch=self.batch)
            self.model = load_model(self.base)
            self.state = self.model.state_dict()
            if unknown := [key for key in self.base.tensors if key not in self.state]:
                raise CheckpointError(
                    f"{self.base.path}: tensor '{unknown[0]}' has no place in {type(self.model).__name__}; remove it"
                )
        energy, total = 0.0, 0.0
        for key in self.matrices:
            matrix = self._matrix(key)
            change = matrix.update(variant or nothing, seeded(self.seed, self.name, key, part))
            energy, total = energy + float(change.square().sum()), total + float(matrix.D.square().sum())
            self.state[key].copy_(self.base.read(key).double() + change)
        for key in self.others:
            before, after = self.base.read(key), self.expert.read(key)
            self.state[key].copy_(before if variant else after)
            energy += 0.0 if variant else float((after.double() - before.double()).square().sum())
        kl = self.divergence.of(self.model)
        energy = energy / total if total else float("nan")
        return {"energy": energy, "kl": kl.tolist(), "tokens": self.divergence.tokens.tolist()}

    def _matrix(self, key: str) -> Matrix:
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        W0 = self.base.read(key).double()
        made = Matrix(basis(W0), W0, self.expert.read(key).double() - W0, self.side)
        if self.kept is not None:
            self.kept[key] = made
        return made


def _parts(draws: int, swaps: bool, doses: Sequence[float]) -> Iterator[tuple[str, Variant | None]]:
    yield from (("base", nothing), ("matrices", whole), ("non_matrix", None))
    yield from SINGLE.items()
    yield from ((f"{name}_{i}", variant) for name, variant in DRAWN.items() for i in range(draws))
    yield from SWAPS.items() if swaps else ()
    for t in doses:
        yield f"update_{t:g}", dose(t, rotated=False)
        yield f"rotation_{t:g}", dose(t, rotated=True)


def _chosen(rollouts: list[Rollout], problems: int | None, seed: int) -> list[Rollout]:
    """The rollouts of `problems` problems, in an order that the seed fixes."""

    def rank(problem: str) -> str:
        return hashlib.sha256(f"{seed}/{problem}".encode()).hexdigest()

    kept = set(sorted({rollout.problem for rollout in rollouts}, key=rank)[:problems])
    return [rollout for rollout in rollouts if rollout.problem in kept]


def _check(side: str, draws: int, tight: float) -> None:
    if side not in ("small", "left", "right"):
        raise ConfigError(f"evidence.function.side: {side!r} is not small, left or right")
    if draws < 1:
        raise ConfigError(f"evidence.function.draws: {draws}; at least one random direction is needed")
    if tight <= 0:
        raise ConfigError(f"evidence.function.tight: {tight}; give a width above 0")
