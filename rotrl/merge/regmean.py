"""The average of linear maps that answers each expert's own inputs best."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotrl.errors import ConfigError
from rotrl.merge.linear import linear, shares
from rotrl.merge.types import Matrix, NonNegative, Share


def regmean(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    off_diagonal: Share = 0.9,
    ridge: NonNegative = 1e-8,
    weights: Sequence[float] | None = None,
    grams: Sequence[Tensor] | None = None,
) -> Tensor:
    """`W = (sum w_i W_i G_i) (sum w_i G_i)^-1`, G_i with its off-diagonal times `off_diagonal`. arXiv 2212.09849.

    With off_diagonal 1 the minimiser of `sum_i w_i |(W - W_i) X_i^T|^2`, X_i (tokens, in) the inputs of expert i's
    layer, `grams` its `G_i = X_i^T X_i / tokens` (in, in): the mean over tokens, as in the authors' code, so that
    experts count alike however long their samples are. Solved in float64 for the distance from the weighted average M
    of the experts: `W = M + (sum w_i (W_i - M) G_i) (S + r I)^-1`, `S = sum w_i G_i`, r = ridge times the mean of S's
    diagonal. So W is M on directions that no sample touches, and everywhere without `grams`.
    """
    if min(weights or [1.0]) < 0:
        raise ConfigError(f"merge.weights are {list(weights or ())}; least squares needs weights of 0 or more")
    mean = linear(base, experts, weights=weights)
    if grams is None:
        return mean
    total, rest = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for expert, gram, weight in zip(experts, grams, shares(weights, len(experts)), strict=True):
        inner = gram.to(expert.device, torch.float64, copy=True).mul_(weight * off_diagonal)
        inner.diagonal().copy_(gram.diagonal()).mul_(weight)
        rest = (expert - mean).double() @ inner + rest
        total = inner.add_(total)
    total.diagonal().add_(ridge * total.diagonal().mean())
    return mean + _divided(rest, total).to(mean)


def _divided(rest: Tensor, total: Tensor) -> Tensor:
    """`rest total^-1` by Cholesky; where there is none, without the directions that float32 can't tell from 0."""
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        return rest @ torch.linalg.pinv(total, rtol=len(total) * torch.finfo(torch.float32).eps, hermitian=True)
    return torch.cholesky_solve(rest.T, factor).T
