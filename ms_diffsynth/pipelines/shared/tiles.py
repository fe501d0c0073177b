"""A VAE in tiles: where they lie, and how their results become one. The arithmetic is NumPy's alone.

Tiles overlap, and where they do, one fades into the next along a straight line. All tiles of an image have the same
size, so that one compilation is enough: the last of a row ends where the image does and overlaps more.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ms_diffsynth.errors import ConfigError

if TYPE_CHECKING:
    from mindspore import Tensor

SIZE = 128  # latent pixels, as DiffSynth-Studio's for Qwen-Image; the stride is half of it


@dataclass(frozen=True)
class Tiles:
    """Squares of ``size`` latent pixels, one every ``stride``. A latent pixel is what the VAE makes of 8 x 8 pixels."""

    size: int
    stride: int

    @classmethod
    def of(cls, tiled: bool | None, tile_size: int | None = None, tile_stride: int | None = None,
           multiple: int = 1) -> Tiles | None:
        """From the arguments of a call; None for an image that is not tiled.

        Args:
            tile_size: None is 128. tile_stride: None is half the size.
            multiple: both are multiples of it.

        Raises: ConfigError naming each argument that is wrong, also when ``tiled`` is false.
        """
        size = SIZE if tile_size is None else tile_size
        stride = max(size // 2 // multiple, 1) * multiple if tile_stride is None and _is_count(size) else tile_stride
        wrong = [] if isinstance(tiled, (bool, np.bool_, type(None))) else [f"tiled={tiled!r}: expected true or false"]
        what = "a positive integer" if multiple == 1 else f"a positive multiple of {multiple}"
        wrong += [f"{name}={value!r}: expected {what}, in latent pixels of the VAE"
                  for name, value in (("tile_size", tile_size), ("tile_stride", tile_stride))
                  if value is not None and (not _is_count(value) or value % multiple)]
        if not wrong and stride > size:
            wrong.append(f"tile_stride={stride}: expected at most tile_size={size}, so that tiles leave no gap")
        if wrong:
            raise ConfigError("; ".join(wrong) + ".")
        return cls(int(size), int(stride)) if tiled else None

    def starts(self, length: int) -> list[int]:
        """Where tiles begin along a side of ``length``."""
        last = length - self.size
        return [0] if last <= 0 else [*range(0, last, self.stride), last]


def weights(starts: list[int], size: int) -> list[np.ndarray]:
    """What each tile counts along one side, float32 [size] each: 1 in all at every place."""
    shares = np.ones((len(starts), size))
    for k in range(len(starts) - 1):
        overlap = starts[k] + size - starts[k + 1]
        if overlap > 0:
            rising = (np.arange(overlap) + 0.5) / overlap
            shares[k, size - overlap:] *= rising[::-1]
            shares[k + 1, :overlap] *= rising
    total = np.zeros(starts[-1] + size)
    for start, share in zip(starts, shares):
        total[start:start + size] += share
    return [(share / total[start:start + size]).astype(np.float32) for start, share in zip(starts, shares)]


def in_tiles(function: Callable[[Tensor], Tensor], image: Tensor, tiles: Tiles, cell: int,
             result_cell: int) -> Tensor:
    """``function(image)`` from its tiles. An image that is no larger than a tile is computed whole: the same bytes.

    Args:
        tiles: here in cells. cell, result_cell: the sides of a cell in ``image`` and in the result.

    Shapes: image [B, C, H, W] -> [B, D, H / cell * result_cell, W / cell * result_cell]; a film has frames before H.
    """
    height, width = (side // cell for side in image.shape[-2:])
    if max(height, width) <= tiles.size:
        return function(image)
    from mindspore import Tensor, mint

    rows, columns = tiles.starts(height), tiles.starts(width)
    high, wide = min(tiles.size, height), min(tiles.size, width)
    row_weights = weights([y * result_cell for y in rows], high * result_cell)
    column_weights = weights([x * result_cell for x in columns], wide * result_cell)
    total = None
    for y, row_weight in zip(rows, row_weights):
        strip = None
        for x, weight in zip(columns, column_weights):
            tile = function(image[..., y * cell:(y + high) * cell, x * cell:(x + wide) * cell])
            sides = (x * result_cell, (width - x - wide) * result_cell)
            part = mint.nn.functional.pad(tile * Tensor(weight), sides)
            strip = part if strip is None else strip + part
        ends = (0, 0, y * result_cell, (height - y - high) * result_cell)
        part = mint.nn.functional.pad(strip * Tensor(row_weight[:, None]), ends)
        total = part if total is None else total + part
    return total


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0
