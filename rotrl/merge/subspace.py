"""Merges of singular subspaces of the task vectors `d_i = W_i - W0`, matrices only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotrl.linalg.procrustes import polar
from rotrl.merge.linear import weighted_sum
from rotrl.merge.types import Matrix


def tsv_m(base: Matrix, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """Task singular vectors: `W0 + scale polar(U) S polar(V)^T`. arXiv 2412.00081, section 4.

    U, S, V are the leading min(m, n) / T singular triplets of every d_i side by side; the polar factors are the
    nearest matrices with orthonormal columns, so that no task's direction is counted in another's.
    """
    rank = max(1, min(base.shape) // len(experts))
    parts = [torch.linalg.svd(expert - base, full_matrices=False) for expert in experts]
    u = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    s = torch.cat([s[:rank] for _, s, _ in parts])
    v = torch.cat([vh[:rank] for _, _, vh in parts]).mT
    return base + scale * (polar(u) * s) @ polar(v).mT


def iso_c(base: Matrix, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """Isotropic merge: `W0 + scale mean(s) U V^T` of `sum d_i = U diag(s) V^T`. arXiv 2502.04959, equation 5."""
    u, s, vh = torch.linalg.svd(weighted_sum([expert - base for expert in experts]), full_matrices=False)
    return base + scale * s.mean() * (u @ vh)
