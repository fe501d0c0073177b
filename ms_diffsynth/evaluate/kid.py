"""Kernel inception distance between two sets of features, unbiased, with an interval. NumPy in float64.

Source: Binkowski, Sutherland, Arbel and Gretton 2018, "Demystifying MMD GANs", section 4, kernel (x.y / d + 1)^3.
Features of EfficientNet-Lite0 stand in the place of Inception's: the values cannot be compared with KID proper.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LABEL = "KID on EfficientNet-Lite0 features, not comparable with Inception KID"
FEWEST = 4  # images: each half of a set needs two
MOST = 5000  # images of a set that are taken, drawn at random: kernels of 200 MB
_SPLITS = 1000
_NORMAL_QUANTILE = 1.96  # 95 %, both sides


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} (95 % interval {self.low:.4f} to {self.high:.4f})"


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / d + 1)^3 of every pair of rows. Shapes: [M, d], [N, d] -> [M, N]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Unbiased squared maximum mean discrepancy of two sets of features, [M, d] and [N, d], M and N at least 3.

    It may be negative: zero is its mean when both sets come from one distribution. The interval is value +- 1.96
    standard errors of the delete-one jackknife over both sets: each image is left out once. Nothing in it is random;
    docs/how_to/evaluation.md measures how often it holds the truth.
    """
    m, n = len(x), len(y)
    cross = kernel(x, y)
    within_x, without_x = _within(kernel(x, x))
    within_y, without_y = _within(kernel(y, y))
    value = within_x + within_y - 2 * cross.mean()
    left_out_x = without_x + within_y - 2 * (cross.sum() - cross.sum(1)) / ((m - 1) * n)
    left_out_y = within_x + without_y - 2 * (cross.sum() - cross.sum(0)) / (m * (n - 1))
    variance = sum((len(v) - 1) * v.var() for v in (left_out_x, left_out_y))
    reach = _NORMAL_QUANTILE * float(np.sqrt(variance))
    return Estimate(value=float(value), low=float(value) - reach, high=float(value) + reach)


def _within(own: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of a set's own kernel over pairs of different images; and the same without each image in turn."""
    n = len(own)
    rows = own.sum(1) - np.diag(own)
    total = rows.sum()
    return total / (n * (n - 1)), (total - 2 * rows) / ((n - 1) * (n - 2))


def floor(y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """What real data scores against itself: 1000 times KID of two random halves of a set of at least 4 images.

    Returns: the range that 95 % of them are in. Its middle is near 0, because the estimate is unbiased.
    """
    own, n = kernel(y, y), len(y)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (_SPLITS, 1)), axis=1)
    m, k = n // 2, n - n // 2
    one = (order < m).astype(np.float64)  # the first half of each split
    rows = one @ own
    sum_one = (rows * one).sum(1)
    sum_cross = rows.sum(1) - sum_one
    sum_two = own.sum() - sum_one - 2 * sum_cross
    diagonal = one @ np.diag(own)
    values = ((sum_one - diagonal) / (m * (m - 1)) + (sum_two - np.trace(own) + diagonal) / (k * (k - 1))
              - 2 * sum_cross / (m * k))
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def drawn(features: np.ndarray, seed: int) -> np.ndarray:
    """At most ``MOST`` rows, drawn without replacement."""
    if len(features) <= MOST:
        return features
    return features[np.random.default_rng(seed).choice(len(features), MOST, replace=False)]
