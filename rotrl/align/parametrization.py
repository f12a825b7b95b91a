"""Rotations of many matrices as few parameters: one stack per shape and side, on the manifold or in its algebra."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from rotrl.align.family import Family
from rotrl.checkpoint.rotations import Rotation
from rotrl.errors import ConfigError
from rotrl.linalg.cayley import cayley
from rotrl.linalg.rotation import orthogonality_error

SIDES = ("small", "left", "right", "both")


class Stiefel(geoopt.EuclideanStiefel):
    """Stiefel manifold with the Euclidean metric and the polar retraction `(X + U)((X + U)^T (X + U))^{-1/2}`.

    The polar factor comes from Newton-Schulz steps `Y <- Y (3 I - Y^T Y) / 2`, which square the distance from
    orthogonality. As `(X + U)^T (X + U) = I + U^T U`, three steps are exact in float32 up to spectral norm .4 of U.
    Against geoopt's QR at equal time on a CPU: ten times nearer to the geodesic, drift mends itself instead of adding
    up, and it is nothing but batched products, which is what a GPU is good at.
    """

    name = "Stiefel(euclidean, polar)"

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        y = x + u
        for _ in range(3):
            y = 1.5 * y - 0.5 * y @ (y.mT @ y)
        return y


class Turns(Family):
    """Rotated weights `R W` (left), `W R` (right) or `L W R` (both).

    `side` is where the rotation acts: `left` (outputs), `right` (inputs), `both`, or `small`, the smaller of the two,
    where the rotation is unique as long as the weight has full rank; square matrices are rotated on the right.
    `block` makes R block-diagonal with blocks of that size; a matrix with fewer dimensions is one block.
    """

    def __init__(self, matrices: Mapping[str, Tensor], *, side: str = "small", block: int | None = None):
        super().__init__(matrices)
        self.stacks: list[tuple[str, tuple[str, ...]]] = []  # side and tensor names of each stack of rotations
        self.acting: list[list[int]] = []  # stacks of rotations that act on each stack of weights
        self.rotations = nn.ParameterList()
        for index, names in enumerate(self.shapes):
            self.acting.append([])
            for acts in sides_of(matrices[names[0]], side):
                d = matrices[names[0]].shape[0 if acts == "left" else 1]
                blocks = d // block if block and block < d else 1
                if d % blocks or (block and blocks > 1 and d % block):
                    raise ConfigError(f"align.block={block} does not divide the {d} dimensions of '{names[0]}'")
                self.acting[-1].append(len(self.stacks))
                self.stacks.append((acts, names))
                self.begin(len(names), blocks, d // blocks, self.weights(index).dtype)

    @abstractmethod
    def begin(self, k: int, blocks: int, d: int, dtype: torch.dtype) -> None:
        """Appends the parameters of k rotations of `blocks` blocks (d, d) at the identity."""

    @abstractmethod
    def matrix(self, stack: int) -> Tensor:
        """The rotations (k, d, d) of a stack, (k, blocks, d, d) where they are block-diagonal."""

    def adapt(self, index: int) -> Tensor:
        weights = self.weights(index)
        for stack in self.acting[index]:
            weights = turn(weights, self.matrix(stack), self.stacks[stack][0])
        return weights

    @torch.no_grad()
    def export(self) -> dict[str, Rotation]:
        """The rotation of every tensor, detached."""
        found: dict[str, dict[str, Tensor]] = {}
        for stack, (acts, names) in enumerate(self.stacks):
            for name, rotation in zip(names, self.matrix(stack), strict=True):
                whole = torch.block_diag(*rotation) if rotation.ndim == 3 else rotation.clone()
                found.setdefault(name, {})[acts] = whole
        return {name: Rotation(**sides) for name, sides in found.items()}

    def prior(self) -> Tensor:
        return self.squared_angle()

    def squared_angle(self) -> Tensor:
        """`sum ||R - I||^2 = sum ||log R||^2 (1 - O(angle^2))`: twice the sum of squared plane angles.

        The chord stands for the logarithm: no eigenvalue problem, a gradient everywhere, 1 % low at 20 degrees.
        """
        parts = [self.matrix(stack) for stack in range(len(self.stacks))]
        return torch.stack([(part - torch.eye(part.shape[-1]).to(part)).square().sum() for part in parts]).sum()

    def rms_angle(self) -> Tensor:
        """Root mean square angle in radians over all dimensions of all rotations (chord, see `squared_angle`)."""
        parts = [self.matrix(stack) for stack in range(len(self.stacks))]
        return (self.squared_angle() / sum(part.numel() // part.shape[-1] for part in parts)).sqrt()

    def orthogonality_error(self) -> Tensor:
        """max |R^T R - I| over all rotations."""
        return torch.stack([orthogonality_error(self.matrix(i)).max() for i in range(len(self.stacks))]).max()

    def measures(self) -> dict[str, Tensor]:
        return {"angle_rms": self.rms_angle().rad2deg(), "orthogonality_error": self.orthogonality_error()}


class Rotations(Turns):
    """Rotations as points of the Stiefel manifold, for RiemannianAdam.

    Its second moment is one scalar per matrix of a stack, so stacking changes nothing but the number of calls, and its
    first step has Frobenius length lr whatever the size: a stack of (d, d) gets `lr sqrt(d)`, so that lr is the rms
    angle in radians.
    """

    def begin(self, k: int, blocks: int, d: int, dtype: torch.dtype) -> None:
        identity = torch.eye(d, dtype=dtype).expand(*((k, blocks) if blocks > 1 else (k,)), -1, -1).clone()
        self.rotations.append(geoopt.ManifoldParameter(identity, manifold=Stiefel()))  # type: ignore[call-arg]

    def matrix(self, stack: int) -> Tensor:
        return self.rotations[stack]

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [part], "lr": lr * math.sqrt(part.shape[-1])} for part in self.rotations]

    @torch.no_grad()
    def assign(self, rotations: Mapping[str, Rotation]) -> None:
        """Moves to the given rotations of all tensors, on the sides where these act."""
        for (acts, names), part in zip(self.stacks, self.rotations, strict=True):
            if part.ndim > 3:
                raise ConfigError("align.init=procrustes: a dense rotation has no blocks; use init=identity")
            part.copy_(torch.stack([getattr(rotations[name], acts) for name in names]))

    @torch.no_grad()
    def drift(self) -> float:
        return float(self.orthogonality_error())


class CayleyTurns(Turns):
    """`R = (I - Q)^{-1} (I + Q)`, `Q = (A - A^T) / 4`, with every entry of A free, for Adam."""

    def begin(self, k: int, blocks: int, d: int, dtype: torch.dtype) -> None:
        shape = (k, blocks, d, d) if blocks > 1 else (k, d, d)
        self.rotations.append(nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def matrix(self, stack: int) -> Tensor:
        a = self.rotations[stack]
        return cayley((a - a.mT) / 4)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Adam's first step has length lr in every entry: over sqrt(d) it is the rms angle of the rotation."""
        return [{"params": [part], "lr": lr / math.sqrt(part.shape[-1])} for part in self.rotations]


class LowRankTurns(Turns):
    """`R = exp(A B^T - B A^T)` with A and B (d, rank): turns in at most `2 rank` dimensions, `2 d rank` parameters.

    With M = [A, B] and J = [[0, I], [-I, 0]] the generator is M J M^T, so `R = I + M phi(J M^T M) J M^T`,
    `phi(z) = (exp z - 1) / z`: the exponential is that of a matrix of size 2 rank.
    """

    def __init__(self, matrices: Mapping[str, Tensor], *, side: str = "small", rank: int = 4, seed: int = 0):
        if rank < 1:
            raise ConfigError(f"align.rank={rank}; give a rank of at least 1")
        self.rank, self.random = rank, torch.Generator().manual_seed(seed)
        super().__init__(matrices, side=side)

    def begin(self, k: int, blocks: int, d: int, dtype: torch.dtype) -> None:
        a = torch.randn(k, d, self.rank, generator=self.random, dtype=dtype) / d**0.5
        self.rotations.append(nn.Parameter(torch.stack([a, torch.zeros_like(a)], 1)))

    def matrix(self, stack: int) -> Tensor:
        a, b = self.rotations[stack].unbind(1)
        m, j = torch.cat([a, b], -1), torch.cat([b, -a], -1).mT  # j = J M^T
        small = j @ m
        eye = torch.eye(small.shape[-1]).to(small)
        upper, zeros = torch.cat([small, eye.expand_as(small)], -1), torch.zeros_like(small).repeat(1, 1, 2)
        phi = torch.linalg.matrix_exp(torch.cat([upper, zeros], -2))[..., : len(eye), len(eye) :]
        return torch.eye(m.shape[-2]).to(m) + m @ phi @ j

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """The generator of a first step has rms angle sqrt(2 rank) times the step of an entry of B."""
        return [{"params": list(self.rotations), "lr": lr / math.sqrt(2 * self.rank)}]


def turn(weights: Tensor, rotations: Tensor, acts: str) -> Tensor:
    """`R W` or `W R` for stacks (k, m, n) and (k, d, d) or, block-diagonal, (k, blocks, d, d)."""
    if acts == "right":
        return turn(weights.mT, rotations.mT, "left").mT if rotations.ndim > 3 else weights @ rotations
    if rotations.ndim == 3:
        return rotations @ weights
    return (rotations @ weights.unflatten(1, rotations.shape[1:3])).flatten(1, 2)


def sides_of(matrix: Tensor, side: str) -> tuple[str, ...]:
    """The sides where a matrix (out, in) is rotated; ConfigError for a side that is none of SIDES."""
    return ("left", "right") if side == "both" else (side_of(matrix, side),)


def side_of(matrix: Tensor, side: str) -> str:
    """`left` or `right` for a matrix (out, in), of which `both` gives the one of `small`."""
    if side not in SIDES:
        raise ConfigError(f"align.side={side!r}; one of: {', '.join(SIDES)}")
    if side in ("left", "right"):
        return side
    return "left" if matrix.shape[0] < matrix.shape[1] else "right"
