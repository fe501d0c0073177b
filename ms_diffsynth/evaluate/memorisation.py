"""Which images of a set are copies of a reference: nearest neighbours, and how near the reference is to itself.

Distances are Euclidean, in two spaces, because each is blind to what the other sees: features to noise and to traces of
compression, coarse pixels to shifts and mirrors (measured in docs/how_to/evaluation.md).
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NEAR = 0.05  # share of the reference that counts as near to each other
SAME = 1e-3  # distance below which two images are one; both spaces have distances of the order of 1 and more
_ROWS = 1000  # of distances at a time: 80 MB for 10,000 references


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """The nearest reference image of every image, in one space."""

    index: np.ndarray  # [M], which reference image
    distance: np.ndarray  # [M], float64
    limit: float  # 95 % of the reference images are farther than this from their nearest other one
    twins: int  # reference images that are in the set twice; they do not count for the limit

    @property
    def closeness(self) -> np.ndarray:
        """Distances in units of the limit: 1 and less is nearer than real images are."""
        return self.distance / self.limit

    @property
    def is_near(self) -> np.ndarray:
        """Which images are as near to a reference image as only 5 % of those are to each other."""
        return self.distance <= self.limit


def neighbours(x: np.ndarray, y: np.ndarray) -> Neighbours:
    """Nearest neighbours of the rows of x [M, d] among those of y [N, d]."""
    found = [(block.argmin(1), block.min(1)) for _, block in _distances(x, y)]
    own, twins = [], 0
    for start, block in _distances(y, y):
        block[np.arange(len(block)), start + np.arange(len(block))] = np.inf
        twins += int((block < SAME).any(1).sum())
        block[block < SAME] = np.inf
        own.append(block.min(1))
    others = np.concatenate(own)
    others = others[np.isfinite(others)]
    limit = float(np.quantile(others, NEAR)) if others.size else SAME
    return Neighbours(index=np.concatenate([i for i, _ in found]), distance=np.concatenate([d for _, d in found]),
                      limit=limit, twins=twins)


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Distances [rows, N] of some rows of x at a time, with the index of the first."""
    squares = (y * y).sum(1)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS]
        yield start, np.sqrt(np.maximum((rows * rows).sum(1)[:, None] + squares - 2 * rows @ y.T, 0))
