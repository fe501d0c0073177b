"""How far arrays are from each other, and images of noise."""
from __future__ import annotations

import numpy as np
from mindspore import Tensor
from PIL import Image


def relative(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """The largest difference, of the largest element that is wanted."""
    found, wanted = (x.asnumpy() if isinstance(x, Tensor) else x for x in (found, wanted))
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
