"""How SDXL's UNet is called."""
from __future__ import annotations

import mindspore as ms

from ms_diffsynth.units import TensorUnit


class Denoise(TensorUnit):
    """The network's prediction at noisy latents.

    Shapes: latents float [B, C, H, W], timestep_index [B] of 0 to 999, prompt_embeds [B, L, D], pooled_prompt_embeds
    [B, P], time_ids float32 [B, 6] -> prediction float32 [B, C, H, W]. The network computes in ``dtype``; timestep
    and sizes stay as they are up to their sinusoids.
    """

    input_params = ("latents", "timestep_index", "prompt_embeds", "pooled_prompt_embeds", "time_ids")
    output_params = ("prediction",)
    onload_model_names = ("unet",)

    def construct(self, latents, timestep_index, prompt_embeds, pooled_prompt_embeds, time_ids):
        prediction = self.unet(latents.astype(self.dtype), timestep_index, prompt_embeds.astype(self.dtype),
                               pooled_prompt_embeds.astype(self.dtype), time_ids)
        return (prediction.astype(ms.float32),)
