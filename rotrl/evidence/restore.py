"""The base's singular vectors put back into the expert by ranks or by layers, beside as much energy taken out anywhere.

Published for models after SFT and RL (arXiv 2508.16546, 2509.12235): the vectors of the largest singular values, or of
the first quarter of the layers, put back alone undo most of what training did. No control is given there; here each
restoration stands beside an update that lacks as much of D and is as far from it, at random places of all matrices.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from rotrl.errors import ConfigError
from rotrl.evidence.variants import Matrix, Variant, normal, random_part, values

Span = Sequence[float]


def ranks(start: float, stop: float) -> Variant:
    """The expert's singular values with the base's vectors at the ranks from start to stop (shares of all)."""

    def restored(x: Matrix, generator: Generator) -> Tensor:
        r = len(x.frame.s)
        band = slice(round(start * r), round(stop * r))
        before, after = ((b.U[:, band] * x.after.s[band]) @ b.V[:, band].mT for b in (x.frame, x.after))
        return x.D + before - after

    return restored


def layers(start: float, stop: float) -> Variant:
    """The same for all ranks of the matrices in the layers from start to stop; the others are the expert's."""
    return lambda x, generator: values(x, generator) if start <= x.depth < stop else x.D


def left_out(energy: float, taken: float) -> Variant:
    """D less random coordinates of it, plus noise: as much energy, and as far from D, as a change C has and is.

    energy = ||C||^2 and taken = ||D - C||^2 over ||D||^2. The coordinates hold what C lacks of D, which is
    <D, D - C> / ||D||^2 = (1 - energy + taken) / 2. What C puts in its place, taken less that, is isotropic here: base
    vectors at a few ranks alone do not fit the others.
    """
    share = (1 - energy + taken) / 2

    def changed(x: Matrix, generator: Generator) -> Tensor:
        noise = normal(x.D, generator)
        size = (max(0.0, taken - share) * x.D.square().sum()).sqrt()
        return x.D - random_part(x, share, generator) + noise * size / torch.linalg.matrix_norm(noise)

    return changed


def restorations(spans: Mapping[str, Sequence[Span]] | None) -> dict[str, Variant]:
    """{ranks_0-20: variant}, from {"ranks": [[0, 0.2]], "layers": [[0, 0.25]]}. Raises ConfigError on other spans."""
    kinds = {"ranks": ranks, "layers": layers}
    found = {}
    for kind, given in (spans or {}).items():
        if kind not in kinds:
            raise ConfigError(f"evidence.function.restore: {kind!r} is not ranks or layers")
        for span in given:
            if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
                raise ConfigError(f"evidence.function.restore.{kind}: {list(span)} is no span of shares; try [0, 0.2]")
            found[f"{kind}_{100 * span[0]:g}-{100 * span[1]:g}"] = kinds[kind](*span)
    return found
