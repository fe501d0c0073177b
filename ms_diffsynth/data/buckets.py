"""Resolution buckets: a few image sizes near the shapes that a data set has, so that a compiled step is compiled once
for each, and what bringing images to them costs."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError, listing
from .operators import DataProcessingOperator, crop_and_resize

MOST = 8  # buckets that are chosen when their number is left open: each is a compilation of the step
TOLERANCE = 0.1  # what an image may lose to a bucket that is not its own, before one more is taken
LARGE_CUT, LARGE_SCALE = 0.2, 1.1  # the share of an image that is cut off, and the enlargement, that are warned of
MOST_COMPARED = 2000, 500  # sizes of images, and buckets, that are compared to choose; the most frequent ones


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


def own_bucket(width: int, height: int, max_pixels: int, factor: int = 16) -> Bucket:
    """The size of an image that keeps its shape: shrunk to at most ``max_pixels``, sides rounded down to ``factor``.

    No side is less than ``factor``: an image as thin as that loses length instead.

    Source: DiffSynth-Studio 2.1.12, ``ImageCropAndResize``. Raises: ConfigError when ``max_pixels`` holds no bucket.
    """
    if max_pixels < factor * factor:
        raise ConfigError(f"max_pixels={max_pixels}: expected at least {factor * factor}, which is {factor} x {factor} "
                          f"pixels. Did you mean {(max(max_pixels, factor) // factor * factor) ** 2}?")
    scale = max(1.0, (width * height / max_pixels) ** 0.5)
    down, across = (max(factor, int(side / scale) // factor * factor) for side in (height, width))
    longest = max_pixels // factor // factor * factor
    return Bucket(min(down, longest), min(across, longest))


def losses(sizes: Sequence[tuple[int, int]], buckets: Sequence[Bucket]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What bringing images of (width, height) to buckets costs; float64 [images, buckets] each.

    Returns: the share of an image's area that is cut off; the scale, above 1 where it is enlarged; and the loss from 0
        to 1 by which buckets are compared, which counts the cut, the finer detail of a larger image that goes to a
        small bucket (by its side), and the pixels that enlarging makes up.
    """
    width, height = np.array(sizes, np.float64).reshape(-1, 2, 1).transpose(1, 0, 2)
    down, across = np.array([b.size for b in buckets], np.float64).reshape(-1, 2).T
    scale = np.maximum(across / width, down / height)
    kept = np.minimum(1, down * across / (width * height * scale**2))
    detail = np.sqrt(np.minimum(1, down * across / (width * height)))
    return 1 - kept, scale, 1 - kept * detail / np.maximum(1, scale) ** 4


def choose_buckets(sizes: Sequence[tuple[int, int]], max_pixels: int, factor: int = 16,
                   most: int | None = None) -> list[Bucket]:
    """Buckets near the shapes of the images, as many as it takes for each to keep its own, but at most ``most``.

    None for ``most`` takes as few as leave every image within ``TOLERANCE`` of its own bucket, at most ``MOST``. The
    choice depends on the sizes and their counts alone, not on their order.

    Args: ``sizes`` (width, height) of every image in pixels. Raises: ConfigError for an impossible ``max_pixels``.
    """
    counts = Counter(sizes)
    images = sorted(counts, key=lambda size: (-counts[size], size))[:MOST_COMPARED[0]]
    weights = np.array([counts[size] for size in images], np.float64)
    own = [own_bucket(*size, max_pixels, factor) for size in images]
    by_count = [bucket for bucket, _ in Counter(own).most_common(MOST_COMPARED[1])]
    sides = {math.isqrt(bucket.height * bucket.width) for bucket in by_count}
    candidates = sorted({*by_count, *(own_bucket(side, side, max_pixels, factor) for side in sides)})
    shrunk = np.array([max(1, w * h / max_pixels) ** 0.5 for w, h in images])  # by max_pixels, which is no loss here
    loss = 1 - (1 - losses(images, candidates)[2]) * shrunk[:, None]
    place = {bucket: k for k, bucket in enumerate(candidates)}
    allowed = np.array([loss[i, place[b]] if b in place else loss[i].min() for i, b in enumerate(own)])
    allowed += TOLERANCE if most is None else 1e-9
    limit = min(MOST if most is None else most, len(candidates))

    def best(others: list[int]) -> int:
        """The candidate that, beside others, leaves the least: of squares, so that no image is left far behind."""
        so_far = loss[:, others].min(axis=1, initial=1.0)
        return int((weights[:, None] * np.minimum(so_far[:, None], loss) ** 2).sum(axis=0).argmin())

    chosen: list[int] = []
    while len(chosen) < limit and not (chosen and (loss[:, chosen].min(axis=1) <= allowed).all()):
        chosen.append(best(chosen))
        for _ in range(10):  # those that were taken first may stand better now
            before = list(chosen)
            for k in range(len(chosen)):
                chosen[k] = best(chosen[:k] + chosen[k + 1:])
            if chosen == before:
                break
    used = set(loss[:, chosen].argmin(axis=1))
    return sorted(candidates[c] for k, c in enumerate(chosen) if k in used)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket to which a width x height image loses the least; see `losses`. Of equal ones the first."""
    if not buckets:
        raise ConfigError("the list of buckets is empty; expected at least one. Use choose_buckets(sizes, max_pixels)")
    return buckets[int(losses([(width, height)], buckets)[2].argmin())]


class BucketCropAndResize(DataProcessingOperator):
    """Bring an image to the size of its nearest bucket: scale to cover, crop the centre.

    Args: ``chosen_by`` the rule that the buckets follow from the images by, which then describes them.
    """

    def __init__(self, buckets: Sequence[Bucket], chosen_by: Mapping[str, Any] | None = None):
        self.buckets, self.chosen_by = list(buckets), chosen_by
        self.not_described = ("chosen_by",) if chosen_by is None else ("buckets",)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of width x height is brought to."""
        return nearest_bucket(width, height, self.buckets).size

    def __call__(self, data: Image.Image) -> Image.Image:
        return crop_and_resize(data, *self.target_size(*data.size))


def describe_fit(sizes: Sequence[tuple[int, int]], names: Sequence[str], buckets: Sequence[Bucket],
                 remedy: str, thing: str = "image") -> tuple[str, list[str]]:
    """What images of (width, height) become in their nearest buckets: a line for a log, and what to warn of.

    ``names``: of the images. ``remedy``: a sentence on how to lose less. ``thing``: what one of them is called.
    """
    cuts, scales, loss = losses(sizes, buckets)
    chosen = loss.argmin(axis=1)
    cut, scale = (array[np.arange(len(sizes)), chosen] for array in (cuts, scales))
    found = Counter(chosen.tolist())
    shown = listing((f"{buckets[k]} ({n} {thing}{'s' if n > 1 else ''})" for k, n in found.most_common()), 20)
    worst, largest = int(cut.argmax()), int(scale.argmax())
    enlarged = np.flatnonzero(scale > 1 + 1e-9)
    line = (f"{len(found)} size{'s' if len(found) > 1 else ''} in pixels, height x width: {shown}; "
            + (f"{cut.mean():.1%} is cut off on average, at most {cut[worst]:.1%} ({names[worst]}); "
               if cut[worst] > 1e-9 else "nothing is cut off; ")
            + (f"{len(enlarged)} enlarged, by up to {scale[largest]:.2f}x ({names[largest]})" if len(enlarged)
               else "none is enlarged"))
    warnings = []
    if order := sorted(np.flatnonzero(cut > LARGE_CUT), key=lambda i: -cut[i]):
        warnings.append(f"{len(order)} of {len(sizes)} {thing}s lose more than a fifth of themselves at the edges: "
                        f"{listing((f'{names[i]} {cut[i]:.0%}' for i in order), 5)}. {remedy}")
    if order := sorted(np.flatnonzero(scale > LARGE_SCALE), key=lambda i: -scale[i]):
        warnings.append(f"{len(order)} of {len(sizes)} {thing}s are smaller than what they are trained at, and "
                        "enlarged: "
                        f"{listing((f'{names[i]} {scale[i]:.2f}x' for i in order), 5)}. {remedy}")
    return line, warnings
