"""How Stable Diffusion 3's transformer is called: it cuts latents into patches itself."""
from __future__ import annotations

import mindspore as ms

from ms_diffsynth.units import TensorUnit


class Denoise(TensorUnit):
    """Velocity at noisy latents.

    Shapes: latents float [B, C, H, W], sigma float32 [B], prompt_embeds [B, L, D], pooled_prompt_embeds [B, P] ->
    velocity float32 [B, C, H, W]. The network computes in ``dtype``, but the timestep stays float32 up to its
    sinusoids: bfloat16 keeps 8 bits of it.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "pooled_prompt_embeds")
    output_params = ("velocity",)
    onload_model_names = ("dit",)

    def construct(self, latents, sigma, prompt_embeds, pooled_prompt_embeds):
        velocity = self.dit(latents.astype(self.dtype), prompt_embeds.astype(self.dtype),
                            pooled_prompt_embeds.astype(self.dtype), sigma.astype(ms.float32) * 1000)
        return (velocity.astype(ms.float32),)
