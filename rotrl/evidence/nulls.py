"""Updates that carry no rotation, or a known part of one: what every measure is read against.

A control takes the base, the real update and its coordinates in the basis of the base, and gives another update of the
same matrix, or its coordinates alone where these suffice: no matrix is made, no basis applied. Draws depend
on the seed and on names alone, so a row is the same whatever is measured beside it.
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


def seeded(seed: int, *names: str) -> Generator:
    """A generator for one draw, named by what is drawn (expert, tensor, control)."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def isotropic(W0: Tensor, D: Tensor, c: Coordinates, generator: Generator) -> Tensor:
    """Gaussian noise of the norm of D."""
    noise = torch.randn(D.shape, generator=generator, dtype=D.dtype).to(D.device)
    return noise * (torch.linalg.matrix_norm(D) / torch.linalg.matrix_norm(noise))


def sign_flip(W0: Tensor, D: Tensor, c: Coordinates, generator: Generator) -> Coordinates:
    """D with random signs in the singular basis of the base: its energy on every pair stays, their relation goes.

    Outside the thin basis whole columns (or rows) change sign, which keeps the free block's energies.
    """
    flipped, signs = c.T * _signs(c.T, generator), _signs(c.s, generator)
    outside = None if c.outside is None else c.outside * signs.unsqueeze(-1) * signs.unsqueeze(-2)
    return c._replace(T=flipped, outside=outside)


def permuted(W0: Tensor, D: Tensor, c: Coordinates, generator: Generator) -> Tensor:
    """D with its rows and its columns in random order: the same entries and spectrum, unrelated to the base."""
    rows, columns = (torch.randperm(size, generator=generator).to(D.device) for size in D.shape[-2:])
    return D[..., rows, :][..., columns]


def bf16_rounding(W0: Tensor, D: Tensor, c: Coordinates, generator: Generator) -> Tensor:
    """bf16(W0 + noise) - W0 with noise of the norm of D: what storage in bfloat16 makes of noise."""
    noisy = W0.to(D.dtype) + isotropic(W0, D, c, generator)
    return noisy.to(torch.bfloat16).to(D.dtype) - W0.to(D.dtype)


Control = Callable[[Tensor, Tensor, Coordinates, Generator], Tensor | Coordinates]
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


def plant(c: Coordinates, fraction: float, *, side: Side, generator: Generator) -> Coordinates:
    """sqrt(1 - f) sign-flipped D + sqrt(f) rotation of the energy of D, in the singular basis of the base.

    The rotation is the tangent part of a second sign flip, so both halves have the energy profile of D. Signs of
    the free block are independent in the two, so there energies add, as they do in the mean.
    """
    noise, carrier = (c._replace(T=c.T * _signs(c.T, generator)) for _ in range(2))
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


def _signs(like: Tensor, generator: Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1
