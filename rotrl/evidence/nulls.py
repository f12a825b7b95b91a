"""Updates that carry no rotation, or a known part of one: what every measure is read against.

A control takes bases W0 (b, m, n), their real updates and the coordinates of these in the basis of the base, and gives
other updates of the same matrices, or their coordinates alone where these suffice: no matrix is made, no basis applied.
Each matrix draws from a generator of its own, which depends on the seed, on names and on the kind of device alone, so
a row is the same whatever is measured beside it, in a batch or alone.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from rotrl.errors import ConfigError
from rotrl.linalg.spectrum import Coordinates, Side
from rotrl.linalg.tangent import tangent_part

Generators = Sequence[Generator]


def seeded(seed: int, *names: str, device: str = "cpu") -> Generator:
    """A generator for one draw, named by what is drawn (expert, tensor, control). It draws on its device."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def isotropic(W0: Tensor, D: Tensor, c: Coordinates, generators: Generators) -> Tensor:
    """Gaussian noise of the norm of D."""
    noise = torch.empty_like(D)
    for matrix, generator in zip(noise, generators, strict=True):
        matrix.normal_(generator=generator)
    return noise.mul_((torch.linalg.matrix_norm(D) / torch.linalg.matrix_norm(noise))[:, None, None])


def sign_flip(W0: Tensor, D: Tensor, c: Coordinates, generators: Generators) -> Coordinates:
    """D with random signs in the singular basis of the base: its energy on every pair stays, their relation goes.

    Outside the thin basis whole columns (or rows) change sign, which keeps the free block's energies.
    """
    flipped, signs = c.T * _signs(c.T, generators), _signs(c.s, generators)
    outside = None if c.outside is None else c.outside * signs.unsqueeze(-1) * signs.unsqueeze(-2)
    return c._replace(T=flipped, outside=outside)


def permuted(W0: Tensor, D: Tensor, c: Coordinates, generators: Generators) -> Tensor:
    """D with its rows and its columns in random order: the same entries and spectrum, unrelated to the base."""
    drawn = torch.empty_like(D)
    for matrix, own, g in zip(drawn, D, generators, strict=True):
        rows, columns = (torch.randperm(size, generator=g, device=g.device) for size in own.shape)
        matrix.copy_(own[rows][:, columns])
    return drawn


def bf16_rounding(W0: Tensor, D: Tensor, c: Coordinates, generators: Generators) -> Tensor:
    """bf16(W0 + noise) - W0 with noise of the norm of D: what storage in bfloat16 makes of noise."""
    noisy = isotropic(W0, D, c, generators).add_(W0.to(D.dtype))
    return noisy.to(torch.bfloat16).to(D.dtype) - W0.to(D.dtype)


Control = Callable[[Tensor, Tensor, Coordinates, Generators], Tensor | Coordinates]
CONTROLS: dict[str, Control] = {f.__name__: f for f in (isotropic, sign_flip, permuted, bf16_rounding)}


def check_controls(names: Iterable[str]) -> None:
    """Raises ConfigError on a control that does not exist, with the nearest one."""
    for name in names:
        if name not in CONTROLS:
            near = difflib.get_close_matches(name, CONTROLS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"evidence.geometry.controls: unknown control {name!r}{hint}; one of: {', '.join(CONTROLS)}"
            )


def plant(c: Coordinates, fraction: float, *, side: Side, generators: Generators) -> Coordinates:
    """sqrt(1 - f) sign-flipped D + sqrt(f) rotation of the energy of D, in the singular basis of the base.

    The rotation is the tangent part of a second sign flip, so both halves have the energy profile of D. Signs of
    the free block are independent in the two, so there energies add, as they do in the mean.
    """
    noise, carrier = (c._replace(T=c.T * _signs(c.T, generators)) for _ in range(2))
    turn = tangent_part(carrier, side=side)
    keep = torch.as_tensor(1.0 - fraction).to(c.T)
    gain = fraction * c.energy / turn.energy  # no tangent direction at all (one row or column): NaN, as kappa is
    T = keep.sqrt() * noise.T + gain.sqrt()[..., None, None] * turn.T
    below, beside = (keep * a + gain[..., None] * b for a, b in ((c.below, turn.below), (c.beside, turn.beside)))
    energy = T.square().sum((-2, -1)) + below.sum(-1) + beside.sum(-1)
    return Coordinates(c.s, T, below, beside, energy, c.shape)


def planted_fraction(kappa: float, curve: Sequence[tuple[float, float]]) -> float:
    """The planted fraction of rotation energy that shows this kappa, by the calibration curve [(fraction, kappa)].

    Linear between the planted points, clipped to [0, 1]; a curve that a draw made fall is raised to its maximum so far.
    """
    fractions, kappas = np.array(sorted(curve)).T
    return float(np.interp(kappa, np.maximum.accumulate(kappas), fractions))


def _signs(like: Tensor, generators: Generators) -> Tensor:
    drawn = torch.empty_like(like)
    for matrix, generator in zip(drawn, generators, strict=True):
        matrix.random_(0, 2, generator=generator)
    return drawn.mul_(2).sub_(1)
