"""Limits that keep NaN and infinity, so that later checks see them."""
from __future__ import annotations

from mindspore import Tensor, ops


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` limited to [low, high]; what is not finite stays as it is.

    MindSpore's clamp turns NaN into ``low`` on the CPU (2.10), and infinity into a limit everywhere: a broken
    prediction became a black image, or a variance that looks sound.
    """
    return ops.select(ops.isfinite(x), ops.clamp(x, low, high), x)
