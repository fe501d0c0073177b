"""Places of Z-Image's tokens, and the tables that turn queries and keys by them.

A place is (t, row, column). The token i of the text has t = 1 + i, those that fill it up included. All tokens of the
image have the t that follows the text, which differs from sample to sample; those that fill the image up are at
(0, 0, 0).

Shape legend: B batch, N image tokens, L text tokens (both filled up), S = N + L, D channels of a head.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from ms_diffsynth.pipelines.shared.rotary import pairs_table

MULTIPLE = 32  # image and text are filled up, each by itself, to a multiple of so many tokens; these are attended to


def filled(tokens: int) -> int:
    """The tokens of a sequence that is filled up."""
    return -(-tokens // MULTIPLE) * MULTIPLE


@ops.constexpr
def constants(height: int, width: int, text_tokens: int, axes: tuple[int, ...],
              theta: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Cosines and sines of all tokens, zeros where the t of the image would be; those of every t; which tokens have it.

    Shapes: float32 [1, S, D] each, [text_tokens + 2, D] each, [1, S, 1].

    Args:
        height, width: of the image, in tokens.
        text_tokens: filled up.
    """
    count = height * width
    places, is_image = np.zeros((filled(count) + text_tokens, 3)), np.zeros((1, filled(count) + text_tokens, 1))
    places[:count, 1], places[:count, 2] = np.divmod(np.arange(count), width)
    places[filled(count):, 0] = 1 + np.arange(text_tokens)
    fixed = pairs_table(places, axes, theta, are_rounded=True)
    fixed[:, :count, :axes[0]] = 0
    moving = pairs_table(np.arange(text_tokens + 2)[:, None], axes[:1], theta, are_rounded=True)
    moving = np.pad(moving, [(0, 0), (0, 0), (0, sum(axes[1:]))])
    is_image[:, :count] = 1
    return (tuple(Tensor(x[None]) for x in fixed), tuple(Tensor(x) for x in moving), Tensor(is_image, ms.float32))


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
    fixed, moving, is_image = constants(height, width, text_tokens, axes, theta)
    t = (lengths + 1).astype(ms.int32)
    return (fixed[0] + is_image * mint.index_select(moving[0], 0, t).expand_dims(1),
            fixed[1] + is_image * mint.index_select(moving[1], 0, t).expand_dims(1))
