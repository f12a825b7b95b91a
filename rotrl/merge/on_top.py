"""Changes to the singular values of another method's merge; `of` in the configuration is that method.

`merged` is its merge W, matrices only; all other tensors stay as it made them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rotrl.linalg.procrustes import singular
from rotrl.merge.types import Equivariant, Positive, Share


def svc(
    base: Equivariant,
    experts: Sequence[Tensor],
    *,
    merged: Tensor,
    alpha: Positive = 0.1,
) -> Tensor:
    """Singular values calibrated against counting shared directions T times. arXiv 2602.05536.

    `W - W0 = sum_r s_r u_r v_r^T`, `t_ri = <u_r^T (W - W0), u_r^T d_i> / |u_r^T d_i|^2` (1 where d_i has nothing along
    u_r), and `s_r T / sum_i max(alpha, t_ri)` takes the place of s_r. alpha 1 for TSV-M and WUDI.
    """
    u, s, vh = singular((merged - base).double())
    t = []
    for expert in experts:
        part = u.mT @ (expert - base).double()
        energy = part.square().sum(1)
        present = energy > 1e-24 * part.square().sum()
        t.append(torch.where(present, (s[:, None] * vh * part).sum(1) / torch.where(present, energy, 1.0), 1.0))
    gamma = len(experts) / torch.stack(t).clamp(min=alpha).sum(0)
    return (base + (u * (s * gamma)) @ vh).to(base)


def subspace_boosting(base: Equivariant, experts: Sequence[Tensor], *, merged: Tensor, beta: Share = 0.01) -> Tensor:
    """Raises the singular values of `W - W0` below the cut to the cut. arXiv 2506.16506.

    The cut is the first singular value at which the cumulated share of their sum reaches beta. At the default .01
    that is mostly the largest, so that all become equal to it: choose the scale of `of` accordingly.
    """
    u, s, vh = singular((merged - base).double())
    cut = s[torch.searchsorted(s.cumsum(0), beta * s.sum()).clamp(max=len(s) - 1)]
    return (base + (u * s.clamp(min=cut)) @ vh).to(base)


def spectrum_projection(
    base: Equivariant, experts: Sequence[Tensor], *, merged: Tensor, reference: Literal["base", "mean"] = "base"
) -> Tensor:
    """`U diag(s) V^T` of `W = U diag(.) V^T`, s the singular values of the base or the mean of the experts' own."""
    u, _, vh = singular(merged.double())
    models = [base] if reference == "base" else experts
    s = torch.stack([torch.linalg.svdvals(model.double()) for model in models]).mean(0)
    return ((u * s) @ vh).to(base)
