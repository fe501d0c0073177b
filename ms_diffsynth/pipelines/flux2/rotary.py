"""Positions of FLUX.2's tokens, made on the host in float64 and rounded once to float32.

A position is (t, row, column, l): the image has t = 0, the k-th edit image t = 10 k, and text only l. mindone 0.5.0
makes the tables inside the network, in float64, which an NPU does not have.

Shape legend: B batch, L text tokens, N image tokens, M edit tokens, D channels of a head.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.errors import DataError, listing
from ms_diffsynth.pipelines.shared.rotary import pairs_table

EDIT_STEP = 10  # between one image and the next, on the axis t
PLACES = 1024  # a side of 16384 pixels; or a hundred images


def text_places(tokens: int) -> np.ndarray:
    """(0, 0, 0, l) for every token: float64 [L, 4]."""
    places = np.zeros((tokens, 4))
    places[:, 3] = np.arange(tokens)
    return places


def image_places(height: int, width: int, t: int = 0) -> np.ndarray:
    """(t, row, column, 0) for every token, row by row; sides in tokens: float64 [height * width, 4]."""
    places = np.zeros((height, width, 4))
    places[..., 0] = t
    places[..., 1] = np.arange(height)[:, None]
    places[..., 2] = np.arange(width)[None, :]
    return places.reshape(-1, 4)


def edit_places(sides: Sequence[tuple[int, int]]) -> np.ndarray:
    """The positions of edit images one after the other, their sides in tokens: int32 [M, 4].

    Raises: DataError for more images, or longer sides, than there are places.
    """
    places = np.concatenate([image_places(*side, t=EDIT_STEP * (k + 1)) for k, side in enumerate(sides)])
    if places.max() >= PLACES:
        raise DataError(f"edit images of {listing(sides)} tokens reach position {int(places.max())}: expected less "
                        f"than {PLACES} on every axis. Give fewer or smaller ones.")
    return places.astype(np.int32)


@ops.constexpr
def axis_tables(axes: tuple[int, ...], theta: float) -> tuple[tuple[Tensor, ...], ...]:
    """Cosines and sines, for each axis of the places 0, 1, ...: float32 [PLACES, channels], constants."""
    line = np.arange(PLACES, dtype=np.float64)[:, None]
    return tuple(tuple(Tensor(pairs_table(line, (channels,), theta)[k]) for channels in axes) for k in range(2))


def edit_table(places: Tensor, axes: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of edit images, looked up: places int32 [B, M, 4] -> float32 [B, M, D] each."""
    cos, sin = axis_tables(axes, theta)
    return (ops.cat([ops.gather(cos[k], places[:, :, k], 0) for k in range(len(axes))], -1),
            ops.cat([ops.gather(sin[k], places[:, :, k], 0) for k in range(len(axes))], -1))


@ops.constexpr
def image_table(text_tokens: int, height: int, width: int, axes: tuple[int, ...],
                  theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of text and image, constants: float32 [1, L + N, D] each."""
    places = np.concatenate([text_places(text_tokens), image_places(height, width)])
    cos, sin = pairs_table(places, axes, theta)
    return Tensor(cos[None]), Tensor(sin[None])
