"""From an image to pixels, and from noisy pixels to what the network predicts of them."""
from __future__ import annotations

import mindspore as ms

from ms_diffsynth.units import PipelineUnit, TensorUnit


class LoadPixels(PipelineUnit):
    """An image as pixels; there is no VAE, so they are the latents.

    Shapes: input_image PIL -> input_latents float32 [1, 3, H, W] in [-1, 1].
    """

    input_params = ("input_image",)
    output_params = ("input_latents",)

    def process(self, pipe, input_image):
        return {"input_latents": pipe.preprocess_image(input_image)}


class Denoise(TensorUnit):
    """The network's prediction at noisy pixels. It computes in ``dtype``.

    Shapes: latents float [B, 3, H, W], timestep_index int32 [B] -> prediction float32 [B, 3, H, W].
    """

    input_params = ("latents", "timestep_index")
    output_params = ("prediction",)
    onload_model_names = ("unet",)

    def construct(self, latents, timestep_index):
        return (self.unet(latents.astype(self.dtype), timestep_index, return_dict=False)[0].astype(ms.float32),)
