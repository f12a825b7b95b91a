"""What is rotated and towards whom: the source's weights and the teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.rotations import Rotation, is_frame
from rotrl.errors import ConfigError, NumericsError


@dataclass(frozen=True)
class Problem:
    """`state` holds every tensor of the source; `spec` says what it is, as in the metadata of a rotations file.

    `folder` holds the source, None for a merge that stands nowhere. `mix` weighs the teachers, 1 in all.
    """

    spec: dict[str, Any]
    state: dict[str, Tensor]
    teachers: dict[str, Checkpoint]
    mix: dict[str, float]
    folder: str | None = None

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The linear maps of attention and MLP: what is rotated."""
        return {name: tensor for name, tensor in self.state.items() if role_of(name, tensor.shape).is_matrix}

    def target(self, name: str) -> Tensor:
        """Mean of the teachers by `mix`, float64: `sum_k w_k |S R - T_k|^2` has its minimiser in common with it."""
        parts = [weight * self.teachers[teacher].read(name).double() for teacher, weight in self.mix.items()]
        return torch.stack(parts).sum(0)

    def terms(self, name: str) -> list[tuple[float, Tensor, None]]:
        """The target as the one term of a square (`Turns.closed_form`)."""
        return [(1.0, self.target(name), None)]


def refuse_reflections(rotations: Mapping[str, Rotation]) -> None:
    """NumericsError that names every tensor whose orthogonal matrix has determinant -1; frames have none."""
    sides = {name: rotation.right if rotation.left is None else rotation.left for name, rotation in rotations.items()}
    whole = {name: matrix for name, matrix in sides.items() if matrix is not None and not is_frame(matrix)}
    wrong = [name for name, matrix in whole.items() if torch.linalg.slogdet(matrix).sign < 0]
    if wrong:
        raise NumericsError(
            f"{', '.join(wrong)}: the Procrustes solution is a reflection (determinant -1); raise align.anchor"
        )


def pose(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    source: str,
    start: Mapping[str, Any] | None,
    teachers: str | Sequence[str],
    mix: Mapping[str, float] | None = None,
    vectors: Mapping[str, Checkpoint] | None = None,
) -> Problem:
    """Reads or merges the source: "base", an expert's name, or "start", the merge that the config `start` gives.

    Teachers, weighed by `mix`, are the experts themselves; as a source and in the start they are what `vectors` says,
    if it is given.
    """
    vectors = vectors or experts
    mixed = check_problem(list(experts), source=source, start=start, teachers=teachers, mix=mix)
    chosen = {name: experts[name] for name in mixed}
    if source == "start":
        from rotrl.merge.bind import bind
        from rotrl.merge.engine import merge_state

        spec = dict(start or {})
        merged = merge_state(base, vectors, bind(spec, list(vectors)))
        state = {name: tensor.float() for name, tensor in merged.items()}  # whatever it was computed in
        return Problem({"merge": spec}, state, chosen, mixed)
    if source == "base":
        state = {name: base.read(name) for name in base.tensors}
        return Problem({"model": "base"}, state, chosen, mixed, str(base.path))
    expert = vectors[source]
    state = {name: expert.read(name) for name in expert.tensors}
    return Problem({"expert": source}, state, chosen, mixed, None if expert.derived else str(expert.path))


def check_problem(
    experts: Sequence[str],
    *,
    source: str,
    start: Mapping[str, Any] | None,
    teachers: str | Sequence[str],
    mix: Mapping[str, float] | None,
) -> dict[str, float]:
    """The shares of the teachers; ConfigError for a source, teachers or a mix that there can't be, all at once."""
    names = list(experts) if teachers == "all" else [teachers] if isinstance(teachers, str) else list(teachers)
    faults = [
        f"align.teachers: no expert {name!r}; one of: all, {', '.join(experts)}"
        for name in names
        if name not in experts
    ]
    if not names:
        faults.append("align.teachers is empty; give at least one expert")
    if source == "start" and not start:
        faults.append("align.source=start needs align.start, the config of a merge; or source=base")
    if source not in ("start", "base", *experts):
        faults.append(f"align.source={source!r}; one of: start, base, {', '.join(experts)}")
    if faults:
        raise ConfigError("; ".join(faults))
    return shares(mix, names)


def shares(mix: Mapping[str, float] | None, teachers: Sequence[str]) -> dict[str, float]:
    """Weights of the teachers over their sum, equal if `mix` is None."""
    given = dict.fromkeys(teachers, 1.0) if mix is None else dict(mix)
    if given.keys() != set(teachers) or not all(weight > 0 for weight in given.values()):
        raise ConfigError(f"align.mix={given}; give every teacher a weight above 0: {', '.join(teachers)}")
    total = sum(given.values())
    return {name: given[name] / total for name in teachers}
