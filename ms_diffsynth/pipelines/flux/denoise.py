"""How FLUX.1's transformer is called: latents are packed into tokens, and the velocity is unpacked again.

Shape legend: B batch, C latent channels, H and W latent sides, N = H W / 4 image tokens.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.units import TensorUnit


@ops.constexpr
def image_ids(height: int, width: int) -> Tensor:
    """Position of every image token, a constant: float32 [N, 3] holding (0, row, column); sides in latent pixels.

    Source: diffusers 0.35 FluxPipeline._prepare_latent_image_ids.
    """
    ids = np.zeros((height // 2, width // 2, 3), np.float32)
    ids[..., 1] = np.arange(height // 2)[:, None]
    ids[..., 2] = np.arange(width // 2)[None, :]
    return Tensor(ids.reshape(-1, 3))


class Denoise(TensorUnit):
    """Velocity at noisy latents. ``guidance`` is used by guidance-distilled networks (FLUX.1-dev) only.

    Shapes: latents float [B, C, H, W], sigma float32 [B], prompt_embeds [B, L, D], pooled_prompt_embeds [B, P],
    guidance float32 [B] -> velocity float32 [B, C, H, W]. The network computes in ``dtype``.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "pooled_prompt_embeds", "guidance?")
    output_params = ("velocity",)
    onload_model_names = ("dit",)

    def attach(self, pipe):
        super().attach(pipe)
        self.is_guided = bool(pipe.config("dit")["guidance_embeds"])

    def construct(self, latents, sigma, prompt_embeds, pooled_prompt_embeds, guidance=None):
        height, width = latents.shape[2], latents.shape[3]
        if not self.is_guided:
            guidance = None
        tokens = self.dit(
            hidden_states=pack(latents).astype(self.dtype),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled_prompt_embeds.astype(self.dtype),
            encoder_hidden_states=prompt_embeds.astype(self.dtype),
            txt_ids=ops.zeros((prompt_embeds.shape[1], 3), ms.float32),
            img_ids=image_ids(height, width),
            return_dict=False,
        )[0]
        return (unpack(tokens, height, width).astype(ms.float32),)
