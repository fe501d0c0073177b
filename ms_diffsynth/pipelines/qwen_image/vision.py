"""The vision tower of Qwen2.5-VL on mindone's weights: how the text encoder sees the references of an edit model.

Pictures do not see each other, so each is computed by itself. Most layers attend within windows; patches are put in an
order in which those of a window lie together, and windows of one size are a batch.

Shape legend: P patches, U = P / 4 tokens of the language model (2 x 2 patches), H heads, D channels of a head, E = H D.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from PIL import Image

from ms_diffsynth.models import arguments
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import frequencies, rotate_halves

with quiet_imports():
    from mindone.transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as mindone
    from transformers import Qwen2_5_VLConfig

PATCH, FRAMES = 14, 2  # pixels on a side of a patch, and frames in it: an image is two equal ones
MERGE = 2  # patches on a side of a token
LEAST, MOST = 4 * 28 * 28, 16384 * 28 * 28  # pixels of a picture: preprocessor_config.json of Qwen-Image-Edit
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
THETA = 10000.0


def fitting(height: int, width: int) -> tuple[int, int]:
    """The sides that the processor gives a picture: multiples of 28, with LEAST to MOST pixels together.

    Source: transformers 4.57, smart_resize of Qwen2VLImageProcessor.
    """
    side = PATCH * MERGE
    down, across = (max(side, round(length / side) * side) for length in (height, width))
    if down * across > MOST:
        scale = math.sqrt(height * width / MOST)
        return tuple(max(side, math.floor(length / scale / side) * side) for length in (height, width))
    if down * across < LEAST:
        scale = math.sqrt(LEAST / (height * width))
        return tuple(math.ceil(length * scale / side) * side for length in (height, width))
    return down, across


def patches_of(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture as patches in the order in which 2 x 2 of them are a token, and its (rows, columns) in patches.

    Returns: float32 [P, 1176], a patch being (channel, frame, row, column). Source: transformers 4.57,
    Qwen2VLImageProcessor.
    """
    height, width = fitting(image.height, image.width)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32) / np.float32(255)
    pixels = ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)
    rows, columns = height // PATCH, width // PATCH
    parts = np.broadcast_to(pixels, (FRAMES, *pixels.shape)).reshape(
        FRAMES, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH).transpose(2, 5, 3, 6, 1, 0, 4, 7)
    return np.ascontiguousarray(parts.reshape(rows * columns, -1)), (rows, columns)


def windows(rows: int, columns: int, side: int) -> list[np.ndarray]:
    """The tokens of each window, those of one size together: ``rows`` x ``columns`` tokens in squares of ``side``."""
    tokens = np.arange(rows * columns).reshape(rows, columns)
    found = [tokens[top:top + side, left:left + side].ravel()
             for top in range(0, rows, side) for left in range(0, columns, side)]
    return sorted(found, key=len)


@ops.constexpr
def window_groups(rows: int, columns: int, side: int) -> tuple[tuple[int, int], ...]:
    """(how many windows, patches of each) for each size of window, in the order of `windows`; sides in patches."""
    sizes = [len(window) * MERGE**2 for window in windows(rows // MERGE, columns // MERGE, side)]
    return tuple((sizes.count(size), size) for size in sorted(set(sizes)))


@ops.constexpr
def window_order(rows: int, columns: int, side: int) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their windows, and the way back: int32 [U] each; sides in patches."""
    order = np.concatenate(windows(rows // MERGE, columns // MERGE, side)).astype(np.int32)
    return Tensor(order), Tensor(np.argsort(order).astype(np.int32))


@ops.constexpr
def patch_table(rows: int, columns: int, side: int, channels: int) -> Tensor:
    """Cosines and sines of patches in the order of windows: float32 [2, P, D / 2]. The first half of the pairs of
    channels goes by the row, the second by the column."""
    grids = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    row, column = (grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE).swapaxes(1, 2).reshape(-1, MERGE**2)
                   for grid in grids)
    order = np.concatenate(windows(rows // MERGE, columns // MERGE, side))
    powers = frequencies(channels // 2, THETA)
    angles = np.concatenate([np.outer(place[order].ravel().astype(np.float32), powers) for place in (row, column)], 1)
    return Tensor(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))


class VisionTower(nn.Cell):
    """Tokens of one picture, as the language model takes them.

    Shapes: patches float32 [P, 1176], rows and columns in patches -> [U, W], row by row.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = Qwen2_5_VLConfig(**arguments(Qwen2_5_VLConfig, config))
        vision = self.config.vision_config
        self.visual = mindone.Qwen2_5_VisionTransformerPretrainedModel._from_config(vision)
        del self.visual.rotary_pos_emb
        self.heads, self.head_dim = vision.num_heads, vision.hidden_size // vision.num_heads
        self.side = vision.window_size // MERGE // PATCH  # of a window, in tokens
        self.full = tuple(vision.fullatt_block_indexes)

    def construct(self, patches, rows, columns):
        weight = self.visual.patch_embed.proj.weight
        x = network.linear_without_bias(patches.astype(weight.dtype), weight.reshape(weight.shape[0], -1))
        order, back = window_order(rows, columns, self.side)
        count, width = x.shape
        x = ops.gather(x.reshape(count // MERGE**2, -1), order, 0).reshape(count, width)
        table = patch_table(rows, columns, self.side, self.head_dim)
        groups, whole = window_groups(rows, columns, self.side), ((1, count),)
        for k in range(len(self.visual.blocks)):
            block = self.visual.blocks[k]
            x = x + self.attention(block.attn, norm(block.norm1, x), table, whole if k in self.full else groups)
            x = x + block.mlp(norm(block.norm2, x))
        merger = self.visual.merger
        x = merger.mlp(norm(merger.ln_q, x).reshape(count // MERGE**2, -1))
        return ops.gather(x, back, 0)

    def attention(self, attn, x, table, groups):
        """x [P, E], patches of which (number, length) groups attend to each other -> the same shape."""
        count = x.shape[0]
        qkv = attn.qkv(x).reshape(count, 3, self.heads, self.head_dim).transpose(1, 2, 0, 3)  # [3, H, P, D]
        q, k, v = (rotate_halves(qkv[:1], table).swapaxes(1, 2), rotate_halves(qkv[1:2], table).swapaxes(1, 2),
                   qkv[2:].swapaxes(1, 2))
        attend, found, begin = network.attention(x.dtype), (), 0
        for number, length in groups:
            end, shape = begin + number * length, (number, length, self.heads, self.head_dim)
            out = attend(q[:, begin:end].reshape(shape), k[:, begin:end].reshape(shape), v[:, begin:end].reshape(shape))
            found += (out.reshape(number * length, -1),)
            begin = end
        return attn.proj(ops.cat(found, 0))


def norm(cell, x):
    """mindone's RMS norm."""
    return network.rms_norm(x, cell.weight, cell.variance_epsilon)
