"""Merges that weigh a task vector's part against what the other experts want: ResMerge and WUDI, matrices only."""

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

import torch
from torch import Tensor

from rotrl.linalg.procrustes import singular
from rotrl.merge.linear import weighted_sum
from rotrl.merge.types import Averaged, Equivariant, Matrix, NonNegative, Positive, Share, Within


def resmerge(
    base: Equivariant,
    experts: Averaged,
    *,
    scale: float = 1.0,
    softening: Share = 0.3,
    head: NonNegative = 0.2,
) -> Tensor:
    """ResMerge: a consensus of what is left of d_i without its leading singular triplet H_i. arXiv 2606.02252.

    `R_i = d_i - H_i`, `q_i = R_i / |R_i|`, q the normalised sum, s the mean cosine of pairs, c the mean cosine with q,
    `beta = 1 - softening ((s + 1)/2 + (c + 1)/2) / 2`. A is mean R_i where `c <= 1/sqrt(T)`, else
    `c^beta mean|R_i| q`. `W0 + scale (A + head S_H |A| mean(H) / |mean(H)|)`, S_H the mean positive cosine of pairs of
    heads.
    """
    vectors = [(expert - base).double() for expert in experts]
    heads = []
    for d in vectors:
        u, s, vh = singular(d)
        heads.append(s[0] * torch.outer(u[:, 0], vh[0]))
    rests = [d - h for d, h in zip(vectors, heads, strict=True)]
    count, mean = len(experts), weighted_sum(rests) / len(experts)
    q = _normalised(weighted_sum([_normalised(r) for r in rests]))
    c = sum(_cosine(r, q) for r in rests) / count
    if c > count**-0.5:
        s = sum(_pairs(rests)) / len(_pairs(rests))
        beta = 1 - softening * ((s + 1) / 2 + (c + 1) / 2) / 2
        mean = c**beta * sum(float(r.norm()) for r in rests) / count * q
    agreement = sum(max(0.0, x) for x in _pairs(heads)) / len(_pairs(heads))
    update = mean + head * agreement * mean.norm() * _normalised(weighted_sum(heads))
    return (base + scale * update).to(base)


def wudi(
    base: Matrix,
    experts: Sequence[Tensor],
    *,
    scale: float = 1.0,
    iters: Annotated[int, Within(0)] = 300,
    lr: Positive = 1e-5,
) -> Tensor:
    """WUDI: `W0 + scale d`, d from `sum d_i` down `sum_i |(d - d_i) d_i^T|^2 / |d_i|^2` by Adam. arXiv 2503.08099.

    The rate is absolute: no entry moves by more than about `iters lr`, 3e-3 by default.
    """
    vectors = [expert - base for expert in experts]
    d = weighted_sum(vectors)
    rows = torch.cat([x / x.norm().clamp(min=torch.finfo(x.dtype).tiny) for x in vectors])
    target = weighted_sum([_gram(x, part) for x, part in zip(vectors, rows.split(len(base)), strict=True)])
    gram = rows.mT @ rows if rows.shape[1] <= 2 * len(rows) else None
    first, second = torch.zeros_like(d), torch.zeros_like(d)
    for step in range(1, iters + 1):
        gradient = 2 * ((d @ gram if gram is not None else _gram(d, rows)) - target)
        first = first.lerp(gradient, 0.1)
        second = second.lerp(gradient.square(), 0.001)
        d = d - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return base + scale * d


def _gram(x: Tensor, rows: Tensor) -> Tensor:
    """`x rows^T rows` by the smaller product."""
    return x @ (rows.mT @ rows) if len(rows) > rows.shape[1] else (x @ rows.mT) @ rows


def _normalised(x: Tensor) -> Tensor:
    return x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)


def _cosine(x: Tensor, y: Tensor) -> float:
    return float((_normalised(x) * _normalised(y)).sum())


def _pairs(tensors: Sequence[Tensor]) -> list[float]:
    """Cosines of all pairs; 1 for a single tensor, which agrees with itself."""
    return [_cosine(x, y) for x, y in combinations(tensors, 2)] or [1.0]
