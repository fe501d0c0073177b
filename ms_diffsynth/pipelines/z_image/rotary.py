"""Places of Z-Image's tokens, and the tables that turn queries and keys by them.

A place is (t, row, column). The token i of the text has t = 1 + i, those that fill it up included. All tokens of the
image have the t that follows the text, which differs from sample to sample; those that fill the image up are at
(0, 0, 0).

Shape legend: B batch, N image tokens, L text tokens (both filled up), S = N + L, D channels of a head.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.pipelines.shared.rotary import table_at

MULTIPLE = 32  # image and text are filled up, each by itself, to a multiple of so many tokens; these are attended to


def filled(tokens: int) -> int:
    """The tokens of a sequence that is filled up."""
    return -(-tokens // MULTIPLE) * MULTIPLE


@ops.constexpr
def places(height: int, width: int, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Places without the t of the image, and where that is to be added: float32 [1, S, 3] each, constants.

    Args:
        height, width: of the image, in tokens.
        text_tokens: filled up.
    """
    count = height * width
    found, is_image = np.zeros((2, filled(count) + text_tokens, 3), np.float32)
    found[:count, 1], found[:count, 2] = np.divmod(np.arange(count), width)
    found[filled(count):, 0] = 1 + np.arange(text_tokens)
    is_image[:count, 0] = 1
    return Tensor(found[None]), Tensor(is_image[None])


@ops.constexpr
def numbers(count: int) -> Tensor:
    """0, 1, ...: float32 [1, count]."""
    return Tensor(np.arange(count, dtype=np.float32)[None])


def table(lengths: Tensor, height: int, width: int, text_tokens: int, axes: tuple[int, ...],
          theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of image and text: float32 [B, S, D] each.

    Args:
        lengths: tokens of each sample's text, filled up by itself: float32 [B].
    """
    found, is_image = places(height, width, text_tokens)
    found = found + is_image * (lengths + 1).reshape(-1, 1, 1)
    return table_at(found.astype(ms.int32), axes, theta, max(text_tokens + 2, height, width), are_rounded=True)
