"""Rotary positions by real cosines and sines, made on the host in NumPy: those of language models, and those of
transformers whose tokens have a place on several axes.

Shape legend: B batch, H heads, L tokens, D channels of a head.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.errors import WeightError


def check_axes(config: Mapping[str, Any]) -> None:
    """Raises: WeightError for a transformer whose positions do not fill the channels of its heads in pairs."""
    axes, channels = config.get("axes_dims_rope"), config.get("attention_head_dim")
    if axes is not None and channels is not None and (sum(axes) != channels or any(size % 2 for size in axes)):
        raise WeightError(f"it says axes_dims_rope={list(axes)} and attention_head_dim={channels}: expected even "
                          "numbers that add up to it. Download the file again.")


def frequencies(channels: int, theta: float) -> np.ndarray:
    """theta^(-2 i / channels) for each pair of channels: float32 [channels / 2], rounded as PyTorch rounds it."""
    exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    return np.float32(1) / np.power(np.float32(theta), exponents)


@ops.constexpr
def text_table(tokens: int, channels: int, theta: float) -> Tensor:
    """Cosines and sines of a language model's positions 0, 1, ...: float32 [2, tokens, channels / 2]."""
    angles = np.outer(np.arange(tokens, dtype=np.float32), frequencies(channels, theta))
    return Tensor(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Turn channels (i, i + D / 2) by their angles, in float32: x [B, H, L, D], from `text_table`."""
    half = x.shape[-1] // 2
    wide = x.astype(ms.float32)
    real, imaginary = wide[..., :half], wide[..., half:]
    turned = ops.cat((real * table[0] - imaginary * table[1], real * table[1] + imaginary * table[0]), -1)
    return turned.astype(x.dtype)


def pairs_table(places: np.ndarray, axes: Sequence[int], theta: float, are_rounded: bool = False) -> np.ndarray:
    """Cosines and sines of places on several axes, each for both channels of a pair: [S, axes] -> float32 [2, S, D].

    Computed in float64: theta^(-2 i / channels) for every axis. Source: diffusers 0.36, Flux2PosEmbed, and Z-Image's
    RopeEmbedder.

    Args:
        are_rounded: angles are rounded to float32 before their cosines, as Z-Image's are: by 4e-6 at 100.
    """
    angles = np.concatenate([np.outer(place, theta ** (-np.arange(0, channels, 2) / channels))
                             for place, channels in zip(places.T, axes)], 1)
    angles = angles.astype(np.float32).astype(np.float64) if are_rounded else angles
    return np.repeat(np.stack([np.cos(angles), np.sin(angles)]), 2, axis=2).astype(np.float32)
