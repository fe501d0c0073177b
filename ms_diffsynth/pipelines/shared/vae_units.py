"""From an image to pixels, and the two units of a VAE without what a family's VAE does: slots and the compute dtype."""
from __future__ import annotations

from ms_diffsynth.errors import DataError
from ms_diffsynth.units import PipelineUnit, TensorUnit


class LoadPixels(PipelineUnit):
    """An image as pixels. Its sides must be multiples of the pipeline's division factor.

    Shapes: input_image PIL -> pixels float32 [1, 3, H, W] in [-1, 1].
    """

    input_params = ("input_image",)
    output_params = ("pixels",)

    def process(self, pipe, input_image):
        width, height = input_image.size
        factor = pipe.division_factor
        if height % factor or width % factor:
            raise DataError(f"an image of {width} x {height} pixels cannot be encoded: expected sides that are "
                            f"multiples of {factor}. Use UnifiedDataset.default_image_operator, or set height "
                            "and width.")
        return {"pixels": pipe.preprocess_image(input_image)}


class EncodeImage(TensorUnit):
    """The VAE's posterior: mean and log-variance, not a sample, so that it can be cached.

    A family's subclass has the ``construct``. Shapes: pixels float32 [B, 3, H, W] in [-1, 1] -> moments float32
    [B, 2C, h, w].
    """

    input_params = ("pixels",)
    output_params = ("moments",)
    onload_model_names = ("vae",)
    has_few_shapes = True


class Decode(TensorUnit):
    """Pixels from latents. A family's subclass has the ``construct``.

    Shapes: latents float32 [B, C, h, w] -> pixels float32 [B, 3, H, W], about [-1, 1].
    """

    input_params = ("latents",)
    output_params = ("pixels",)
    onload_model_names = ("vae",)
