"""Rotary positions by real cosines and sines, made on the host in NumPy.

mindone 0.5.0 multiplies complex numbers inside ``ms._no_grad()``: that neither compiles nor lets a gradient through to
queries and keys.

Shape legend: B batch, S tokens of text and image together, H heads, D channels of a head, L text tokens.
"""
from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.pipelines.shared.rotary import frequencies

THETA = 10000.0  # of the transformer; the text encoder has its own


def image_angles(text_tokens: int, height: int, width: int, axes: tuple[int, ...]) -> np.ndarray:
    """Angle of every token and pair of channels, text first: float32 [S, D / 2]; sides in tokens.

    The image is centred: rows count from -ceil(height / 2), columns likewise, and the frame is 0. Text continues where
    the image ends, on all three axes at once: token l is at max(height // 2, width // 2) + l.

    Source: diffusers 0.35, QwenEmbedRope with scale_rope (use_layer3d_rope is another one).
    """
    text = max(height // 2, width // 2) + np.arange(text_tokens)
    row, column = np.arange(height) - (height - height // 2), np.arange(width) - (width - width // 2)
    rows, columns = (grid.ravel() for grid in np.meshgrid(row, column, indexing="ij"))
    places = (np.concatenate([text, 0 * rows]), np.concatenate([text, rows]), np.concatenate([text, columns]))
    return np.concatenate([np.outer(place.astype(np.float32), frequencies(channels, THETA))
                           for place, channels in zip(places, axes)], 1)


@ops.constexpr
def image_table(text_tokens: int, height: int, width: int, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `image_angles`, constants, each for both channels of a pair: float32 [1, S, D]."""
    angles = np.repeat(image_angles(text_tokens, height, width, axes), 2, axis=1)[None]
    return Tensor(np.cos(angles).astype(np.float32)), Tensor(np.sin(angles).astype(np.float32))
