"""Rotations of the larger side of matrices, as thin frames: no matrix of that size is formed."""

from collections.abc import Callable, Mapping, Sequence

import geoopt
import torch
from torch import Tensor

from rotrl.align.manifold import STEPS
from rotrl.align.parametrization import Rotations, Term
from rotrl.checkpoint.rotations import Rotation
from rotrl.linalg.frames import polar_factors
from rotrl.linalg.procrustes import polar


class StiefelFrames(geoopt.EuclideanStiefel):
    """Frames X (m, n), n <= m, with the Euclidean metric, transport by projection and the polar retraction.

    `Y (Y^T Y)^{-1/2}`, `Y = X + U`, by Newton-Schulz steps on (n, n) matrices alone: two products with (m, n) in all.
    At (8960, 1536) in float32 on a CPU it takes as long as geoopt's QR and is 16 times nearer to the geodesic; the
    Cayley transform in its low-rank form, with (2 n, 2 n) matrices, takes 5 times as long.
    """

    name = "Stiefel(euclidean, polar)"

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        y = x + u
        gram = y.mT @ y
        error = _less_one(gram)
        factor = _less_one(error / -2, -1)
        for _ in range(STEPS):
            if 0.75 * float(torch.linalg.matrix_norm(error).max()) ** 2 < 4 * torch.finfo(y.dtype).eps:
                break
            error = _less_one(factor @ gram @ factor)
            factor = factor @ _less_one(error / -2, -1)
        return y @ factor


def _less_one(m: Tensor, times: int = 1) -> Tensor:
    """M - times I."""
    return m - times * torch.eye(m.shape[-1]).to(m)


class Frames(Rotations):
    """Weights `Q' P` (tall) or `P Q'^T` (wide), of W = Q P or P Q^T, with Q' in place of Q (`linalg.frames`).

    Every matrix has a frame of its own, on its larger side; that of a square one is whole and turns its outputs.
    """

    def __init__(self, matrices: Mapping[str, Tensor]):
        super().__init__(matrices, side="large")

    def blocks(self, d: int, block: int | None, name: str) -> int:
        return 1

    def begin(self, k: int, blocks: int, d: int, like: Tensor) -> None:
        index = len(self.rotations)  # of weights too, as none are shared
        tall = self.tall(index, self.weights(index))
        frames, stretches = tall.clone(), tall.new_empty(k, tall.shape[-1], tall.shape[-1])
        for row in range(0 if tall.is_meta else k):
            q, p = polar_factors(tall[row].double())
            frames[row], stretches[row] = q, p
        self.register_buffer(f"frames_{index}", frames, persistent=False)
        self.register_buffer(f"stretches_{index}", stretches, persistent=False)
        self.rotations.append(geoopt.ManifoldParameter(frames.clone(), manifold=StiefelFrames()))  # type: ignore[call-arg]

    def tall(self, index: int, weights: Tensor) -> Tensor:
        """Weights of a stack, or one of them, with the larger side first; the way back too."""
        return weights if self.weights(index).shape[-2] >= self.weights(index).shape[-1] else weights.mT

    def start(self, index: int) -> tuple[Tensor, Tensor]:
        """Q and P of a stack."""
        return getattr(self, f"frames_{index}"), getattr(self, f"stretches_{index}")

    def adapt(self, index: int) -> Tensor:
        return self.tall(index, self.rotations[index] @ self.start(index)[1])

    def squared_angle(self) -> Tensor:
        """Of the smallest rotations: `|Q' - Q|^2 + n - |Q^T Q'|^2`, chord and sine in place of angles."""
        parts = []
        for index, part in enumerate(self.rotations):
            q, _ = self.start(index)
            parts.append((part - q).square().sum() + len(part) * part.shape[-1] - (q.mT @ part).square().sum())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def by_tensor(self, rotations: Sequence[Tensor]) -> dict[str, Rotation]:
        found = {}
        for index, (names, frames) in enumerate(zip(self.shapes, rotations, strict=True)):
            if frames.shape[-2] == frames.shape[-1]:
                frames = frames @ self.start(index)[0].to(frames).mT
            (side,) = {action.side for action in self.acting[index]}
            found |= {
                name: Rotation(**{side: self.tall(index, own).clone()}) for name, own in zip(names, frames, strict=True)
            }
        return found

    @torch.no_grad()
    def closed_form(
        self, terms: Callable[[str], Sequence[Term]], *, anchor: float, device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """Procrustes: `Q' = polar(sum w T C P + mu Q)` (tall), without C of wide ones, as in `Turns`."""
        stacks: list[Tensor] = []
        for index, names in enumerate(self.shapes):
            stacks.append(torch.empty_like(self.rotations[index], dtype=torch.float64, device="cpu"))
            for row, (name, weight) in enumerate(zip(names, self.weights(index), strict=True)):
                q, p = (part[row].to(device).double() for part in self.start(index))
                left = weight.shape[-2] >= weight.shape[-1]
                overlap, energy = torch.zeros_like(q), torch.zeros((), dtype=q.dtype, device=device)
                for share, target, metric in terms(name):
                    through = p if metric is None or not left else metric.to(p) @ p
                    overlap += share * self.tall(index, target.to(p)) @ through
                    energy += share * (p * through).sum()
                stacks[-1][row] = polar(overlap + anchor * energy / q.shape[-1] * q)
        return stacks


def stiefel_family(
    matrices: Mapping[str, Tensor], *, side: str = "small", block: int | None = None, share: str = "none"
) -> Rotations:
    """Thin frames for the larger side, whole or block-diagonal rotations otherwise."""
    if side == "large" and block is None and share == "none":
        return Frames(matrices)
    return Rotations(matrices, side=side, block=block, share=share)
