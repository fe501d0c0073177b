"""Rotary positions by real cosines and sines, made on the host in NumPy.

mindone 0.5.0 multiplies complex numbers inside ``ms._no_grad()``: that neither compiles nor lets a gradient through to
queries and keys.

Shape legend: B batch, S tokens of text, image and references together, H heads, D channels of a head, L text tokens,
M tokens of references.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, mint, ops

from ms_diffsynth.errors import DataError, listing
from ms_diffsynth.pipelines.shared.rotary import frequencies

THETA = 10000.0  # of the transformer; the text encoder has its own
FIRST, PLACES = -1024, 6144  # of the tables of positions: an image of 32768 pixels on a side, thousands of text tokens


def image_angles(text_tokens: int, height: int, width: int, axes: tuple[int, ...]) -> np.ndarray:
    """Angle of every token and pair of channels, text first: float32 [S, D / 2]; sides in tokens.

    The image is centred: rows count from -ceil(height / 2), columns likewise, and the frame is 0. Text continues where
    the image ends, on all three axes at once: token l is at max(height // 2, width // 2) + l.

    Source: diffusers 0.35, QwenEmbedRope with scale_rope (use_layer3d_rope is another one).
    """
    text = max(height // 2, width // 2) + np.arange(text_tokens)
    rows, columns = centred(height, width)
    places = (np.concatenate([text, 0 * rows]), np.concatenate([text, rows]), np.concatenate([text, columns]))
    return np.concatenate([np.outer(place.astype(np.float32), frequencies(channels, THETA))
                           for place, channels in zip(places, axes)], 1)


@ops.constexpr
def image_table(text_tokens: int, height: int, width: int, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `image_angles`, constants, each for both channels of a pair: float32 [1, S, D]."""
    angles = np.repeat(image_angles(text_tokens, height, width, axes), 2, axis=1)[None]
    return Tensor(np.cos(angles).astype(np.float32)), Tensor(np.sin(angles).astype(np.float32))


def centred(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each token of an image, counted from its middle, row by row: int [height * width] each."""
    row, column = np.arange(height) - (height - height // 2), np.arange(width) - (width - width // 2)
    return tuple(grid.ravel() for grid in np.meshgrid(row, column, indexing="ij"))


def reference_places(sides: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions of references, one after the other, their sides in tokens: int32 [M, 4].

    A position is (frame, row, column, begin): the k-th reference is frame k, counted from 1, and each is centred by
    itself. Text begins behind the largest of all images, which for references is ``begin``, the same for all M.

    Source: diffusers 0.42, QwenEmbedRope. Raises: DataError for references that are larger than the tables.
    """
    begin = max(max(height // 2, width // 2) for height, width in sides)
    if begin >= -FIRST:
        raise DataError(f"references of {listing(sides)} tokens: expected sides of less than {-2 * FIRST}. Give "
                        "smaller ones, or set edit_max_pixels.")
    return np.concatenate([np.stack([np.full(height * width, k), *centred(height, width),
                                     np.full(height * width, begin)], 1)
                           for k, (height, width) in enumerate(sides, 1)]).astype(np.int32)


@ops.constexpr
def axis_tables(axes: tuple[int, ...]) -> tuple[tuple[Tensor, ...], ...]:
    """Cosines and sines for each axis of the positions from FIRST on, for both channels of a pair, constants: float32
    [PLACES, channels]."""
    line = np.arange(FIRST, FIRST + PLACES, dtype=np.float32)
    angles = [np.repeat(np.outer(line, frequencies(channels, THETA)), 2, axis=1) for channels in axes]
    return tuple(tuple(Tensor(function(angle).astype(np.float32)) for angle in angles) for function in (np.cos, np.sin))


@ops.constexpr
def image_places(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of each token of the image, constants: int32 [1, height * width] each."""
    rows, columns = centred(height, width)
    return tuple(Tensor(places[None].astype(np.int32)) for places in (0 * rows, rows, columns))


@ops.constexpr
def text_offsets(text_tokens: int) -> Tensor:
    """0, 1, ...: int32 [1, text_tokens]."""
    return Tensor(np.arange(text_tokens, dtype=np.int32)[None])


def edit_table(text_tokens: int, height: int, width: int, places: Tensor,
               axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of text, image and references, in this order: float32 [B, S, D] each; sides in tokens.

    ``places`` of `reference_places`, int32 [B, M, 4]: text begins where that of the row's largest image says.
    """
    batch, columns = places.shape[0], mint.split(places, 1, 2)  # [B, M, 1] each
    least = text_offsets(1).expand_dims(2) + max(height // 2, width // 2)
    begin = ops.maximum(mint.split(columns[3], 1, 1)[0], least)
    text = (begin + text_offsets(text_tokens).expand_dims(2)).reshape(batch, text_tokens)
    own, (cos, sin) = image_places(height, width), axis_tables(axes)
    rows = [ops.cat((text, ops.broadcast_to(own[k], (batch, height * width)), columns[k].reshape(batch, -1)), 1) - FIRST
            for k in range(len(axes))]
    return (ops.cat([ops.gather(cos[k], rows[k], 0) for k in range(len(axes))], -1),
            ops.cat([ops.gather(sin[k], rows[k], 0) for k in range(len(axes))], -1))
