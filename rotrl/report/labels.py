"""Labels of a scatter that neither cover each other nor the points: few enough for a greedy search."""

from collections.abc import Sequence

import numpy as np

RADII = (9.0, 16.0, 26.0, 38.0, 52.0, 68.0, 86.0)  # from a point to the near side of its label
ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
SWEEPS = 4  # every label is placed again, given the others
PAD = 2.0


def place(
    points: np.ndarray, sizes: np.ndarray, bounds: Sequence[float], faint: np.ndarray | None = None
) -> np.ndarray:
    """Centres of labels, all in pixels: points (n, 2), sizes (n, 2) as width and height, bounds (x0, y0, x1, y1).

    Minimises, label by label, overlap with labels, points and (weakly) the `faint` points, crossing of other labels'
    leader lines, and distance from its own point. Deterministic.
    """
    points, sizes = np.asarray(points, float), np.asarray(sizes, float)
    centres = points + sizes / 2 + RADII[0]
    placed = np.zeros(len(points), bool)
    candidates = [_candidates(point, size) for point, size in zip(points, sizes, strict=True)]
    for _ in range(SWEEPS):
        for i, (around, far) in enumerate(candidates):
            others = placed.copy()
            others[i] = False
            cost = far / 12
            cost = cost + 60 * _outside(around, sizes[i], bounds)
            cost = cost + 80 * _overlaps(around, sizes[i], centres[others], sizes[others])
            cost = cost + 40 * _covers(around, sizes[i], points)
            cost = cost + 12 * _crossings(points[i], around, points[others], centres[others])
            cost = cost + 30 * _crosses_boxes(points[i], around, centres[others], sizes[others])
            if faint is not None and len(faint):
                cost = cost + 0.3 * _covers(around, sizes[i], faint)
            centres[i], placed[i] = around[int(np.argmin(cost))], True
    return centres


def _candidates(point: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    direction = np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)
    centres = [point + direction * (radius + size / 2) for radius in RADII]
    return np.concatenate(centres), np.repeat(RADII, len(ANGLES))


def _overlaps(around: np.ndarray, size: np.ndarray, centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Share of the label that others cover."""
    gap = np.abs(around[:, None] - centres[None]) - (size + sizes[None]) / 2
    shared = np.clip(PAD - gap, 0, None)
    return (shared[..., 0] * shared[..., 1] > 0).sum(1) + (shared.prod(-1) / size.prod()).sum(1)


def _covers(around: np.ndarray, size: np.ndarray, points: np.ndarray) -> np.ndarray:
    return (np.abs(around[:, None] - points[None]) < size / 2 + PAD).all(-1).sum(1)


def _outside(around: np.ndarray, size: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    low, high = np.array(bounds[:2]), np.array(bounds[2:])
    return np.any((around - size / 2 < low) | (around + size / 2 > high), axis=-1)


def _crossings(point: np.ndarray, around: np.ndarray, points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """How many other leader lines the line to each candidate crosses."""

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        u, v = b - a, c - a
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0] > 0

    a, b, c, d = point[None, None], around[:, None], points[None], centres[None]
    return ((side(a, b, c) != side(a, b, d)) & (side(c, d, a) != side(c, d, b))).sum(1)


def _crosses_boxes(point: np.ndarray, around: np.ndarray, centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many other labels the leader line to each candidate runs through."""
    steps = np.linspace(0, 1, 12)[:, None, None]
    along = point + steps * (around - point)  # (steps, candidates, 2)
    inside = (np.abs(along[:, :, None] - centres[None, None]) < sizes / 2).all(-1)
    return inside.any(0).sum(1)
