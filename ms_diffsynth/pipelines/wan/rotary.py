"""Places of Wan's tokens: frame, row and column, each counted from 0, in latent frames and patches of 2 x 2."""
from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.pipelines.shared.rotary import pairs_table

THETA = 10000.0


def axes_of(channels: int) -> tuple[int, int, int]:
    """Channels of a head for frame, row and column: 44, 42 and 42 of 128. Source: diffusers 0.39, WanRotaryPosEmbed."""
    side = 2 * (channels // 6)
    return channels - 2 * side, side, side


@ops.constexpr
def table(frames: int, height: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, constants, each for both channels of a pair: float32 [1, S, D]; sides in tokens."""
    places = np.stack([grid.ravel() for grid in np.meshgrid(np.arange(frames), np.arange(height), np.arange(width),
                                                            indexing="ij")], 1)
    cos, sin = pairs_table(places, axes_of(channels), THETA)
    return Tensor(cos[None]), Tensor(sin[None])
