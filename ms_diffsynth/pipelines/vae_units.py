"""The two units of a VAE, without what a family's VAE does: their slots, and the dtype they compute in."""
from __future__ import annotations

import mindspore as ms

from ms_diffsynth.units import TensorUnit


class EncodeImage(TensorUnit):
    """The VAE's posterior: mean and log-variance, not a sample, so that it can be cached.

    A family's subclass has the ``construct``. Shapes: pixels float32 [B, 3, H, W] in [-1, 1] -> moments float32
    [B, 2C, h, w].
    """

    input_params = ("pixels",)
    output_params = ("moments",)
    onload_model_names = ("vae",)
    has_few_shapes = True

    def __init__(self, dtype: ms.Type):
        super().__init__()
        self.dtype = dtype


class Decode(TensorUnit):
    """Pixels from latents. A family's subclass has the ``construct``.

    Shapes: latents float32 [B, C, h, w] -> pixels float32 [B, 3, H, W], about [-1, 1].
    """

    input_params = ("latents",)
    output_params = ("pixels",)
    onload_model_names = ("vae",)

    def __init__(self, dtype: ms.Type):
        super().__init__()
        self.dtype = dtype
