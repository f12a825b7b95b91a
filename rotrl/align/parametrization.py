"""Rotations of many matrices as few parameters: one stack per shape and side, on the manifold or in its algebra."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from rotrl.align.family import Family
from rotrl.align.manifold import Stiefel
from rotrl.align.sharing import blocks_of, places
from rotrl.checkpoint.rotations import Rotation
from rotrl.errors import ConfigError
from rotrl.linalg.cayley import cayley
from rotrl.linalg.procrustes import nearest
from rotrl.linalg.rotation import orthogonality_error

Term = tuple[float, Tensor, Tensor | None]  # weight, target of a matrix, metric C of its inputs


@dataclass(frozen=True)
class Action:
    """Rotations of a stack that act on one side of a stack of weights: `rows` says which one on each weight."""

    stack: int
    side: str
    inverse: bool
    rows: tuple[int, ...]

    def choose(self, rotations: Tensor) -> Tensor:
        """(k, d, d) for k weights, (d, d) where all have one in common; likewise with blocks."""
        if self.rows != tuple(range(len(rotations))):
            rotations = rotations[self.rows[0]] if len(set(self.rows)) == 1 else rotations[list(self.rows)]
        return rotations.mT if self.inverse else rotations


class Turns(Family):
    """Rotated weights `R W` (left), `W R` (right) or `L W R` (both).

    `side` is where the rotation acts: `left` (outputs), `right` (inputs), `both`, or `small`, the smaller of the two,
    where the rotation is unique as long as the weight has full rank; square matrices are rotated on the right. `large`
    is the other one.
    `block` makes R block-diagonal with blocks of that size; a matrix with fewer dimensions is one block. `share` says
    which matrices have a rotation in common (`sharing.places`).
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], *, side: str = "small", block: int | None = None, share: str = "none"
    ):
        placed = {name: places(name, matrix.shape, side, share) for name, matrix in matrices.items()}
        super().__init__(matrices, [tuple((at.side, at.inverse) for at in placed[name]) for name in matrices])
        self.acting: list[list[Action]] = []  # what acts on each stack of weights
        self.rotations = nn.ParameterList()
        rows: dict[tuple[Any, ...], dict[str, int]] = {}  # rotations by size, and where they need a stack of their own
        sizes: dict[tuple[Any, ...], tuple[int, str]] = {}
        for index, names in enumerate(self.shapes):
            self.acting.append([])
            for number, at in enumerate(placed[names[0]]):
                d = matrices[names[0]].shape[0 if at.side == "left" else 1]
                key = {"none": (index, at.side), "layer": (d, at.side), "residual": ()}[share]
                known = sizes.setdefault(key, (d, names[0]))
                if known[0] != d:
                    raise ConfigError(f"align.share={share}: '{known[1]}' has {known[0]} dimensions, '{names[0]}' {d}")
                owners = rows.setdefault(key, {})
                taken = tuple(owners.setdefault(placed[name][number].owner, len(owners)) for name in names)
                self.acting[-1].append(Action(list(rows).index(key), at.side, at.inverse, taken))
        self.stacks = [tuple(owners) for owners in rows.values()]  # names of the rotations of each stack
        for owners, (d, name) in zip(self.stacks, sizes.values(), strict=True):
            blocks = self.blocks(d, block, name)
            self.begin(len(owners), blocks, d // blocks, self.weights(0))

    def blocks(self, d: int, block: int | None, name: str) -> int:
        return blocks_of(d, block, name)

    @abstractmethod
    def begin(self, k: int, blocks: int, d: int, like: Tensor) -> None:
        """Appends the parameters of k rotations of `blocks` blocks (d, d) at the identity."""

    @abstractmethod
    def matrix(self, stack: int) -> Tensor:
        """The rotations (k, d, d) of a stack, (k, blocks, d, d) where they are block-diagonal."""

    def matrices(self) -> list[Tensor]:
        return [self.matrix(stack) for stack in range(len(self.stacks))]

    def adapt(self, index: int) -> Tensor:
        weights = self.weights(index)
        for action in self.acting[index]:
            weights = turn(weights, action.choose(self.matrix(action.stack)), action.side)
        return weights

    def export(self) -> dict[str, Rotation]:
        """The rotation of every tensor, detached."""
        return self.by_tensor(self.matrices())

    @torch.no_grad()
    def by_tensor(self, rotations: Sequence[Tensor]) -> dict[str, Rotation]:
        """What stacks of rotations are for every tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for names, actions in zip(self.shapes, self.acting, strict=True):
            for action in actions:
                for name, row in zip(names, action.rows, strict=True):
                    own = rotations[action.stack][row]
                    whole = torch.block_diag(*own) if own.ndim == 3 else own.clone()
                    found.setdefault(name, {})[action.side] = whole.mT if action.inverse else whole
        return {name: Rotation(**found[name]) for names in self.shapes for name in names}

    @torch.no_grad()
    def closed_form(
        self, terms: Callable[[str], Sequence[Term]], *, anchor: float, device: torch.device | str = "cpu"
    ) -> list[Tensor] | None:
        """Procrustes: stacks (float64) of the orthogonal R that minimise `sum w |(turned W - T) C^(1/2)|^2`.

        `R = polar(sum w T C W^T + mu I)` on the left, `W^T T` on the right, where a C counts as I for want of a closed
        form; `mu = anchor sum w |W C^(1/2)|^2 / rank`. None where both sides turn, which has no closed form.
        """
        if any(len(actions) > 1 for actions in self.acting):
            return None
        overlaps = [torch.zeros(part.shape, dtype=torch.float64, device=device) for part in self.matrices()]
        energies = [torch.zeros(part.shape[:-1], dtype=torch.float64, device=device) for part in overlaps]
        ranks = [[0] * len(part) for part in overlaps]
        right = {action.stack for (action,) in self.acting if action.side == "right"}
        for index, names in enumerate(self.shapes):
            (action,) = self.acting[index]
            for name, row, weight in zip(names, action.rows, self.weights(index), strict=True):
                whole = weight.to(device).double()
                overlap, energy = overlaps[action.stack][row], energies[action.stack][row]
                for share, target, metric in terms(name):
                    w, t = whole, target.to(whole)
                    through = w if metric is None or action.stack in right else w @ metric.to(w)
                    w, t, through = (w, t, through) if action.side == "left" else (w.mT, t.mT, through.mT)
                    shape = (*energy.shape, w.shape[-1])
                    moment = share * (t.reshape(shape) @ through.reshape(shape).mT)
                    # on the right R^T turns W^T, and the transpose of an inverse is R itself
                    overlap += moment if (action.side == "left") != action.inverse else moment.mT
                    energy += share * (w * through).sum(-1).view_as(energy)
                ranks[action.stack][row] += weight.shape[1 if action.side == "left" else 0]
        for overlap, energy, rank in zip(overlaps, energies, ranks, strict=True):
            least = torch.tensor(rank, device=overlap.device).clamp(max=overlap.shape[-1])
            mu = anchor * energy.sum(-1) / least.view(-1, *[1] * (energy.ndim - 2))
            overlap.diagonal(dim1=-2, dim2=-1).add_(mu[..., None])
        return [torch.stack([nearest(part) for part in overlap]).cpu() for overlap in overlaps]

    def prior(self) -> Tensor:
        return self.squared_angle()

    def squared_angle(self) -> Tensor:
        """`sum ||R - I||^2 = sum ||log R||^2 (1 - O(angle^2))`: twice the sum of squared plane angles.

        The chord stands for the logarithm: no eigenvalue problem, a gradient everywhere, 1 % low at 20 degrees.
        """
        parts = self.matrices()
        return torch.stack([(part - torch.eye(part.shape[-1]).to(part)).square().sum() for part in parts]).sum()

    def rms_angle(self) -> Tensor:
        """Root mean square angle in radians over all dimensions of all rotations (chord, see `squared_angle`)."""
        return (self.squared_angle().clamp(min=0) / self.dimensions()).sqrt()

    def dimensions(self) -> int:
        """Of all rotations together."""
        return sum(part.numel() // part.shape[-1] for part in self.rotations)

    def orthogonality_error(self) -> Tensor:
        """max |R^T R - I| over all rotations."""
        return torch.stack([orthogonality_error(part).max() for part in self.matrices()]).max()

    def measures(self) -> dict[str, Tensor]:
        return {"angle_rms": self.rms_angle().rad2deg(), "orthogonality_error": self.orthogonality_error()}


class Rotations(Turns):
    """Rotations as points of the Stiefel manifold, for RiemannianAdam.

    Its second moment is one scalar per matrix of a stack, so stacking changes nothing but the number of calls, and its
    first step has Frobenius length lr whatever the size: a stack of (d, d) gets `lr sqrt(d)`, so that lr is the rms
    angle in radians.
    """

    def begin(self, k: int, blocks: int, d: int, like: Tensor) -> None:
        identity = torch.eye(d).to(like).expand(*((k, blocks) if blocks > 1 else (k,)), -1, -1).clone()
        self.rotations.append(geoopt.ManifoldParameter(identity, manifold=Stiefel()))  # type: ignore[call-arg]

    def matrix(self, stack: int) -> Tensor:
        return self.rotations[stack]

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [part], "lr": lr * math.sqrt(part.shape[-1])} for part in self.rotations]

    @torch.no_grad()
    def assign(self, rotations: Sequence[Tensor]) -> None:
        """Moves to the given stacks of rotations."""
        for part, given in zip(self.rotations, rotations, strict=True):
            part.copy_(given)

    @torch.no_grad()
    def drift(self) -> float:
        return float(self.orthogonality_error())


class CayleyTurns(Turns):
    """`R = (I - Q)^{-1} (I + Q)`, `Q = (A - A^T) / 4`, with every entry of A free, for Adam."""

    def begin(self, k: int, blocks: int, d: int, like: Tensor) -> None:
        shape = (k, blocks, d, d) if blocks > 1 else (k, d, d)
        self.rotations.append(nn.Parameter(like.new_zeros(shape)))

    def matrix(self, stack: int) -> Tensor:
        a = self.rotations[stack]
        return cayley((a - a.mT) / 4)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Adam's first step has length lr in every entry: over sqrt(d) it is the rms angle of the rotation."""
        return [{"params": [part], "lr": lr / math.sqrt(part.shape[-1])} for part in self.rotations]


def turn(weights: Tensor, rotations: Tensor, side: str) -> Tensor:
    """`R W` or `W R` for weights (k, m, n) and rotations (k, d, d) or, block-diagonal, (k, blocks, d, d); one rotation
    for all weights has no k."""
    whole = rotations.shape[-1] == weights.shape[1 if side == "left" else 2]
    if side == "right":
        return weights @ rotations if whole else turn(weights.mT, rotations.mT, "left").mT
    if whole:
        return rotations @ weights
    return (rotations @ weights.unflatten(1, rotations.shape[-3:-1])).flatten(1, 2)
