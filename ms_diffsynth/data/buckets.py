"""Resolution buckets: a finite list of image sizes, so that a compiled step is compiled once for each.

The list is known before anything is compiled, and is meant to be printed (:func:`describe_buckets`).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import ConfigError
from .operators import DataProcessingOperator, crop_and_resize


@dataclass(frozen=True, order=True)
class Bucket:
    """One image size in pixels."""

    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def make_buckets(max_pixels: int, factor: int = 16, max_aspect: float = 2.0, step: int | None = None) -> list[Bucket]:
    """Sizes of at most ``max_pixels`` pixels and of every aspect ratio up to ``max_aspect``, tall to wide.

    Sides are multiples of ``step``; by default the multiple of ``factor`` nearest to a sixteenth of the square's side
    (64 at 1024 x 1024: 9 buckets). A larger step makes fewer buckets, thus fewer compilations.

    Returns: the list; with each size also the one turned by 90 degrees.
    """
    side = math.isqrt(max(0, max_pixels))
    step = step or max(factor, round(side / 16 / factor) * factor)
    if factor < 1 or step % factor or side < step or max_aspect < 1:
        raise ConfigError(
            f"max_pixels={max_pixels}, factor={factor}, max_aspect={max_aspect}, step={step}: expected max_pixels of "
            "at least step x step, a step that is a multiple of factor, and max_aspect of at least 1. Change one"
        )
    buckets = set()
    for height in range(step, side + 1, step):
        width = max_pixels // height // step * step
        if width <= height * max_aspect:
            buckets |= {Bucket(height, width), Bucket(width, height)}
    square = side // step * step
    buckets.add(Bucket(square, square))
    return sorted(buckets, key=lambda b: b.width / b.height)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest to that of a width x height image, |log(w/h) - log(w'/h')|."""
    if not buckets:
        raise ConfigError("the list of buckets is empty; expected at least one. Use make_buckets(max_pixels)")
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (abs(aspect - math.log(b.width / b.height)), -b.width * b.height, b))


def describe_buckets(buckets: Sequence[Bucket]) -> str:
    """One line for a log: how many buckets, and each as height x width."""
    return f"{len(buckets)} buckets (height x width): {', '.join(str(b) for b in buckets)}"


class BucketCropAndResize(DataProcessingOperator):
    """Bring an image to the size of its nearest bucket: scale to cover, crop the centre."""

    def __init__(self, buckets: Sequence[Bucket]):
        self.buckets = list(buckets)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of width x height is brought to."""
        return nearest_bucket(width, height, self.buckets).size

    def __call__(self, data: Image.Image) -> Image.Image:
        return crop_and_resize(data, *self.target_size(*data.size))
