"""Merges of singular subspaces of the task vectors `d_i = W_i - W0`, matrices only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotrl.linalg.procrustes import polar, singular
from rotrl.merge.linear import weighted_sum
from rotrl.merge.sparse import ties
from rotrl.merge.types import Count, Density, Equivariant, Share

Weights = Sequence[float] | None
Triplets = tuple[Tensor, Tensor, Tensor]
NULL = 1e-6


def tsv_m(base: Equivariant, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """Task singular vectors: `W0 + scale polar(U) S polar(V)^T`. arXiv 2412.00081, section 4.

    U, S, V are the leading min(m, n) / T singular triplets of every d_i side by side; the polar factors are the
    nearest matrices with orthonormal columns, so that no task's direction is counted in another's.
    """
    rank = max(1, min(base.shape) // len(experts))
    u, s, v = _side_by_side([_leading(expert - base, rank) for expert in experts])
    return base + scale * (polar(u) * s) @ polar(v).mT


def iso_c(base: Equivariant, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """Isotropic merge: `W0 + scale mean(s) U V^T` of `sum d_i = U diag(s) V^T`. arXiv 2502.04959, equation 5."""
    u, s, vh = singular(weighted_sum([expert - base for expert in experts]))
    return base + scale * s.mean() * (u @ vh)


def iso_cts(
    base: Equivariant, experts: Sequence[Tensor], *, scale: float = 1.0, common_fraction: Share = 0.8
) -> Tensor:
    """Isotropic in common and task-specific subspaces: `W0 + scale mean(s) polar(U) polar(V)^T`. arXiv 2502.04959.

    Of r = min(m, n) singular triplets U, s, V the first r - T k are the leading ones of `sum d_i`, and k of each expert
    lead what d_i has outside their left space; T k is (1 - common_fraction) r to the nearest multiple of T.
    """
    r, count = min(base.shape), len(experts)
    specific = min(round((r - int(r * common_fraction)) / count), r // count)
    vectors = [expert - base for expert in experts]
    common = _leading(weighted_sum(vectors), r - specific * count)
    outside = [d - common[0] @ (common[0].mT @ d) for d in vectors]
    u, s, v = _side_by_side([*(_leading(d, specific) for d in outside), common])
    return base + scale * s.mean() * polar(u) @ polar(v).mT


def knots_ties(
    base: Equivariant,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.2,
    scale: float = 1.0,
    weights: Weights = None,
    normalize: bool = True,
) -> Tensor:
    """TIES in the shared left basis: `W0 + scale U ties(U^T d_1, ..., U^T d_T)`. arXiv 2410.19735.

    U are the left singular vectors of the updates side by side, (m, T n), without those of singular value 0, which one
    below 1e-6 of the largest counts as.
    """
    vectors = [expert - base for expert in experts]
    u, s, _ = singular(torch.cat(vectors, dim=1))
    u = u[:, s > s[0] * max(NULL, max(base.shape) * torch.finfo(s.dtype).eps)]
    if not u.shape[1]:
        return base.clone()
    parts = [u.mT @ d for d in vectors]
    zero = torch.zeros_like(parts[0])
    return base + scale * u @ ties(zero, parts, density=density, weights=weights, normalize=normalize)


def rewiring(
    base: Equivariant,
    experts: Sequence[Tensor],
    *,
    delta_fraction: Density = 0.01,
    svd_rank: Count = 128,
    scale: float = 1.0,
    weights: Weights = None,
) -> Tensor:
    """`W0 + scale sum w_i U U^T d_i' V V^T`, what the updates rewire between the base's own directions. 2607.03065.

    d_i' keeps the leading `delta_fraction` min(m, n) singular triplets of d_i (at least one), U and V are the leading
    `svd_rank` singular vectors of W0.
    """
    rank = max(1, round(delta_fraction * min(base.shape)))
    u, _, v = _leading(base, svd_rank)
    heads = [(x * s) @ y.mT for x, s, y in (_leading(expert - base, rank) for expert in experts)]
    return base + scale * u @ (u.mT @ weighted_sum(heads, weights) @ v) @ v.mT


def _leading(matrix: Tensor, rank: int) -> Triplets:
    u, s, vh = singular(matrix)
    return u[:, :rank], s[:rank], vh[:rank].mT


def _side_by_side(parts: Sequence[Triplets]) -> Triplets:
    us, ss, vs = zip(*parts, strict=True)
    return torch.cat(us, dim=1), torch.cat(ss), torch.cat(vs, dim=1)
