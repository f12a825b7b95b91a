"""Procrustes rotations of updates (linalg.turns): of small ones from the updates themselves, of others by an SVD.

W0 (..., m, n), D_k = W_k - W0 of the same shape. The anchored Procrustes rotation `R = polar(M)` of
`M = W0^T W_k + mu I` has the Cayley generator Q, `R = (I - Q)^{-1} (I + Q)`, that solves the Riccati equation

    S Q + Q S = K + Q K Q,   S and K the symmetric and the skew part of M.

With `W0^T W0 = V diag(s^2) V^T`, S is `diag(s^2 + mu)` in the basis V but for the update. So Q is iterated from
divisions by `s_i^2 + s_j^2 + 2 mu` and products of matrices as small as the update, of which float32 keeps the digits;
in `W0^T W_k` it has lost them. Where S > 0 and |Q| < 1 the solution is the polar factor: there `x^T M x > 0` for every
x, and an eigenvalue p of `R^T M` with the vector x has `p x^T R x = x^T M x` with `x^T R x > 0`.

Of a wide W0 (m < n) the unknowns are three m x m matrices. With V (n, m) its row space and `B = D (I - V V^T)`,
`Q = V a V^T + V y B - B^T y^T V^T + B^T x B`, and B enters by its Gram matrix alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rotrl.linalg.cayley import inverse_cayley
from rotrl.linalg.frames import polar_factors, smallest_turn, spanned
from rotrl.linalg.procrustes import polar, procrustes
from rotrl.linalg.turns import Turn, Turns

STEPS = 40
LIMIT = 0.5  # of |Q|, a rotation by 53 degrees: what the power series of `Turns.log` is good for
CONDITION = 1e6
TINY = 1e-30
EPS = torch.finfo(torch.float64).eps
ORTHOGONAL = 1e3  # s_1 / s_i up to which `U^T W0 / s` has rows orthogonal to 1e-10


def turns(w0: Tensor, updates: Sequence[Tensor], *, anchor: float) -> Turns:
    """The rotations of the updates that minimise `|W0 R - W_k|^2 + mu |R - I|^2`, `mu = anchor |W0|^2 / min(m, n)`.

    In the dtype of W0 where the updates are small enough for that, else in float64. Raises as `exact_turns` does.
    """
    found = small_turns(w0, updates, anchor=anchor) if anchor else None
    return exact_turns(w0, updates, anchor=anchor) if found is None else found


def exact_turns(w0: Tensor, updates: Sequence[Tensor], *, anchor: float, published: bool = False) -> Turns:
    """The rotations by float64 SVDs in the joint row space of W0 and the updates, out of which no minimiser leads.

    `published` takes `polar(W0^T W_k)` in the whole space, whatever that is where W0 is wide. NumericsError where a
    rotation has determinant -1 or an eigenvalue -1.
    """
    matrices = [m.double() for m in (w0, *updates)]
    frame = torch.eye(w0.shape[-1], dtype=torch.float64, device=w0.device).expand(*w0.shape[:-2], -1, -1)
    if not published and sum(m.shape[-2] for m in matrices) < w0.shape[-1]:
        frame = torch.linalg.qr(torch.cat(matrices, -2).mT)[0].mT
    base, *moved = (m @ frame.mT for m in matrices)
    generators = []
    for d in moved:
        r = polar(base.mT @ (base + d)) if published else procrustes(base, base + d, side="right", anchor=anchor)
        generators.append(Turn(inverse_cayley(r)))
    return Turns(base, frame, _nothing(base), generators)


def given_turns(w0: Tensor, rotations: Sequence[Tensor | None]) -> Turns:
    """Rotations that are given (None: the identity), in float64: R_k (n, n), or frames of a wide W0, of its shape, in
    the joint row space of all (linalg.frames). NumericsError as in `exact_turns`.
    """
    w = w0.double()
    given = [None if r is None else r.to(w).mT for r in rotations]
    frames = [r for r in given if r is not None and r.shape[-2] > r.shape[-1]]
    if len(frames) == sum(r is not None for r in given) and w.shape[-2] < w.shape[-1]:
        basis, found = spanned(polar_factors(w.mT)[0], frames)
        turned = [None if r is None else found.pop(0) for r in given]
    else:
        basis = torch.eye(w.shape[-1]).to(w)
        start = polar_factors(w.mT)[0] if frames else w
        turned = [r if r is None or r.shape[-2] == r.shape[-1] else smallest_turn(start, r) for r in given]
    nothing = basis.new_zeros(basis.shape[-1], basis.shape[-1])
    # Of the transposes, R^T on the left: its generator is -Q.
    generators = [Turn(nothing if r is None else -inverse_cayley(r)) for r in turned]
    return Turns(w @ basis, basis.mT, _nothing(w), generators)


def small_turns(w0: Tensor, updates: Sequence[Tensor], *, anchor: float) -> Turns | None:
    """The rotations of the updates, None where one is not small: the iteration does not contract, or S is indefinite.

    Then M has no polar factor near I and `procrustes` finds the one it has. `mu = anchor |W0|^2 / min(m, n)`, anchor
    above 0. In the dtype of W0, but for the eigenbasis (float64), and float64 where mu is below 1e-6 of the largest
    squared singular value, since float32 then loses more than 1e-4 of Q.
    """
    exact, wide = w0.double(), w0.shape[-2] < w0.shape[-1]
    mu = anchor * exact.square().sum((-2, -1))[..., None] / min(w0.shape[-2:])
    if not (mu > 0).all():  # a base of zeros or NaN
        return None
    squares, basis = (part.flip(-1) for part in torch.linalg.eigh(exact @ exact.mT if wide else exact.mT @ exact))
    squares = squares.clamp(min=0)
    if (squares[..., :1] > CONDITION * mu).any():
        w0, updates = exact, [d.double() for d in updates]
    if not wide:
        return _tall(w0, updates, squares + mu, basis)
    s = squares.sqrt()
    kept = s > s[..., :1] * EPS**0.5
    s, inverse = s * kept, torch.where(kept, 1 / s, 0.0)
    frame = inverse[..., None] * (basis.mT @ exact)
    if (s[..., :1] * inverse > ORTHOGONAL).any():
        q, r = torch.linalg.qr(frame.mT)
        frame = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT
    return _wide(updates, basis, s, mu, frame.to(w0))


def _tall(w0: Tensor, updates: Sequence[Tensor], energies: Tensor, basis: Tensor) -> Turns | None:
    basis, energies = basis.to(w0), energies.to(w0)
    pairs = energies[..., :, None] + energies[..., None, :]
    generators = []
    for d in updates:
        c = basis.mT @ (w0.mT @ d) @ basis
        e, k = (c + c.mT) / 2, (c - c.mT) / 2

        def step(a: Tensor, e: Tensor = e, k: Tensor = k) -> tuple[Tensor]:
            z = (a @ k / 2 - e) @ a
            return ((k + z - z.mT) / pairs,)

        found = _iterated(step, (k / pairs,), [_norm(k / pairs)])
        if found is None or not _definite(torch.diag_embed(energies) + e) or _far(found[0]):
            return None
        generators.append(Turn(found[0]))
    return Turns(w0, basis.mT, _nothing(w0), generators, square=True)


def _wide(updates: Sequence[Tensor], basis: Tensor, s: Tensor, mu: Tensor, frame: Tensor) -> Turns | None:
    """Each Q is `V a V^T + V y B - B^T y^T V^T + B^T x B`, where the rows of B are turned by U^T meanwhile."""
    basis, s, mu = (part.to(frame) for part in (basis, s, mu))
    coefficients, m = [d @ frame.mT for d in updates], s.shape[-1]
    gram = frame.new_zeros(*frame.shape[:-2], m * len(updates), m * len(updates))
    for i, (d, t) in enumerate(zip(updates, coefficients, strict=True)):
        for j in range(i + 1):
            part = d @ updates[j].mT - t @ coefficients[j].mT
            gram[..., i * m : (i + 1) * m, j * m : (j + 1) * m] = part
            gram[..., j * m : (j + 1) * m, i * m : (i + 1) * m] = part.mT
    generators = []
    for index, t in enumerate(coefficients):
        block = slice(index * m, (index + 1) * m)
        found = _wide_generator(basis.mT @ t, basis.mT @ gram[..., block, block] @ basis, s, mu)
        if found is None:
            return None
        a, y, x = found
        y = y @ basis.mT
        x = torch.zeros_like(a) if x is None else basis @ x @ basis.mT
        theta = torch.cat([torch.cat([a, y], -1), torch.cat([-y.mT, x], -1)], -2)
        generators.append(Turn(theta, (index,)))
    left = basis * s[..., None, :]
    return Turns(left, frame, gram, generators, updates=updates, coefficients=coefficients)


def _wide_generator(t: Tensor, gram: Tensor, s: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """a, y, x (None: below rounding) of one update; t (..., m, m) is U^T D V, gram that of the rows of U^T B."""
    c = s[..., :, None] * t
    e, k = (c + c.mT) / 2, (c - c.mT) / 2
    half, mu = s[..., :, None] / 2, mu[..., None]
    energies = s.square()[..., :, None] + mu
    pairs, single = energies + energies.mT, energies + mu

    def step(a: Tensor, y: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        j = y @ gram * half.mT
        ak = a @ k
        z = (ak / 2 - e - j) @ a - j
        right = (ak - j - e) @ y - a * half.mT + torch.diag_embed(half[..., 0])
        if x is not None:
            beyond = gram @ x
            w = half * beyond
            right = right - w + a @ w
        y = right / single
        if x is not None:
            w = half * y
            v = beyond.mT @ w - w - y.mT @ (k @ y) / 2
            x = (v - v.mT) / (2 * mu)
            x = None if (_norm(gram @ x) < torch.finfo(x.dtype).eps).all() else x
        return (k + z - z.mT) / pairs, y, x

    y = torch.diag_embed((half / single)[..., 0])
    size = (_norm(k / pairs).square() + 2 * (y @ gram * y).sum((-2, -1)).clamp(min=0)).sqrt()
    found = _iterated(step, (k / pairs, y, torch.zeros_like(k)), [size, _norm(y)])
    if found is None or not _definite(torch.diag_embed(energies[..., 0]) + e - half * gram * half.mT / mu):
        return None
    a, y, x = found
    beside = (y @ gram * y).sum((-2, -1)).clamp(min=0).sqrt()  # |y B|
    if (beside >= LIMIT / 2).any():
        beside = _norm(y @ gram @ y.mT).sqrt()
    return None if _far(a, beside if x is None else beside + _norm(gram @ x)) else found


def _iterated(step: Callable[..., tuple], start: tuple, sizes: Sequence[Tensor]) -> tuple | None:
    """The fixed point, None where a step does not halve the change of one of the parts that have `sizes`."""
    now, before = start, 1.0
    for _ in range(STEPS):
        last, now = now, step(*now)
        changes = [_norm(new - old) / size.clamp(min=TINY) for new, old, size in zip(now, last, sizes, strict=False)]
        change = float(torch.stack(changes).max())
        rate = change / before
        if change * rate <= 16 * torch.finfo(now[0].dtype).eps:
            return now
        if not rate < 0.5:
            return None
        before = change
    return None


def _nothing(like: Tensor) -> Tensor:
    return like.new_zeros(*like.shape[:-2], 0, 0)


def _norm(m: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(m)


def _far(a: Tensor, beside: Tensor | float = 0.0) -> bool:
    """Whether a generator may have a singular value of LIMIT or more; those of a are bounded by |a| and |a a|^(1/2)."""
    return bool((_norm(a) + beside >= LIMIT).any() and (_norm(a @ a).sqrt() + beside >= LIMIT).any())


def _definite(symmetric: Tensor) -> bool:
    return not torch.linalg.cholesky_ex(symmetric).info.any()
