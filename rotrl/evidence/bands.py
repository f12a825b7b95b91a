"""Where in the spectrum an update lies and turns: energy, rotation and angles by bands of singular directions.

Half of the energy of a plane (i, j) belongs to direction i and half to j, T_ii and what lies beyond the basis to its
direction alone. So bands add up to the whole, and every direction holds 1 / r of isotropic noise.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotrl.linalg.spectrum import Coordinates, Side

COLUMNS = [
    "expert",
    "tensor",
    "layer",
    "module",
    "side",
    "start",
    "stop",
    "directions",
    "energy",
    "energy_noise",
    "share",
    "null",
    "kappa",
    "kappa_low",
    "kappa_high",
    "angle",
    "angle_noise",
]
DECILES = [(i / 10, (i + 1) / 10) for i in range(10)]


class Directions(NamedTuple):
    """Of each of the r singular directions: its energy, its part of the share and of the null (see tangent.tangency).

    covariance (r, r) is that of the planes over sign flips, so that spreads of bands are known too.
    """

    energy: Tensor
    share: Tensor
    null: Tensor
    covariance: Tensor


def directions(c: Coordinates, *, side: Side) -> Directions:
    """Not divided by ||D||^2. Sums over all directions are the numbers of tangency, times ||D||^2."""
    if side == "right":
        return directions(c.mT, side="left")
    weighted = c.T * c.s.unsqueeze(-2)
    pairs = _pairs(c.s)
    own, cross = (_off_diagonal(M * pairs) for M in (weighted.square(), weighted * weighted.mT))
    free = c.below * (c.s > 0)
    null = (own.sum(-1) + own.sum(-2)) / 2 + free
    energy = (c.T.square().sum(-1) + c.T.square().sum(-2)) / 2 + c.below + c.beside
    return Directions(energy, null - cross.sum(-1), null, cross.square())


def turns(c: Coordinates, *, side: Side) -> Tensor:
    """The generator within the basis, (r, r) skew; left (s_j T_ij - s_i T_ji) / (s_i^2 + s_j^2)."""
    if side == "right":
        return turns(c.mT, side="left").mT
    weighted = c.T * c.s.unsqueeze(-2)
    return (weighted - weighted.mT) * _pairs(c.s)


def angles(c: Coordinates, *, side: Side) -> tuple[Tensor, Tensor]:
    """Degrees by which the generator turns each direction, and the root mean square of it for isotropic noise.

    theta_j^2 = sum_i a_ij^2 + below_j / s_j^2; of noise with entries of variance sigma^2 = ||D||^2 / (m n) it is
    sigma^2 (sum_{i != j} 1 / (s_i^2 + s_j^2) + (m - r) / s_j^2): about sigma / s_j in every plane.
    """
    if side == "right":
        return angles(c.mT, side="left")
    m, n = c.shape
    inverse = torch.where(c.s > 0, 1 / c.s.square(), 0.0)
    squares = turns(c, side="left").square().sum(-2) + c.below * inverse
    noise = _off_diagonal(_pairs(c.s)).sum(-2) + (m - c.s.shape[-1]) * inverse
    return squares.sqrt().rad2deg(), (noise * c.energy.unsqueeze(-1) / (m * n)).sqrt().rad2deg()


def band_rows(c: Coordinates, *, side: Side, edges: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A row for each band between the edges, and for each tenth of the spectrum, from the largest singular values on.

    start and stop are shares of the directions; energy and energy_noise shares of ||D||^2; share, null and kappa are
    of the band's own energy; angle and angle_noise medians in degrees. Of a batch each of these is a tensor.
    """
    found = directions(c, side=side)
    turned, noise = angles(c, side=side)
    r = c.s.shape[-1]
    spans = dict.fromkeys([*zip((0.0, *edges), (*edges, 1.0), strict=True), *DECILES])
    for start, stop in spans:
        band = slice(round(start * r), round(stop * r))
        count = band.stop - band.start
        if not count:
            continue
        energy, share, null = (values[..., band].sum(-1) for values in found[:3])
        pairs = found.covariance[..., band, :]
        spread = (pairs.sum((-2, -1)) + pairs[..., band].sum((-2, -1))).sqrt()
        turnable = torch.where(energy > null, energy - null, torch.nan)
        kappa, spread = (share - null) / turnable, spread / turnable
        yield {
            "side": side,
            "start": start,
            "stop": stop,
            "directions": count,
            "energy": energy / c.energy,
            "energy_noise": count / r,
            "share": share / energy,
            "null": null / energy,
            "kappa": kappa,
            "kappa_low": kappa - 1.96 * spread,
            "kappa_high": kappa + 1.96 * spread,
            "angle": turned[..., band].quantile(0.5, dim=-1),
            "angle_noise": noise[..., band].quantile(0.5, dim=-1),
        }


def _pairs(s: Tensor) -> Tensor:
    """1 / (s_i^2 + s_j^2), 0 where both vanish."""
    total = s.square().unsqueeze(-1) + s.square().unsqueeze(-2)
    return torch.where(total > 0, 1 / total, 0.0)


def _off_diagonal(M: Tensor) -> Tensor:
    return M - torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))
