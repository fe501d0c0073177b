"""How FLUX.1's transformer is called: latents are packed into tokens, and the velocity is unpacked again.

Shape legend: B batch, C latent channels, H and W latent sides, N = H W / 4 image tokens.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.shared import control


def places(height: int, width: int, first: int = 0) -> np.ndarray:
    """(first, row, column) of every token, row by row; sides in tokens: float32 [height * width, 3].

    Source: diffusers 0.35 FluxPipeline._prepare_latent_image_ids.
    """
    ids = np.full((height, width, 3), first, np.float32)
    ids[..., 1] = np.arange(height)[:, None]
    ids[..., 2] = np.arange(width)[None, :]
    return ids.reshape(-1, 3)


@ops.constexpr
def image_ids(height: int, width: int) -> Tensor:
    """Position of every image token, a constant: float32 [N, 3]; sides in latent pixels."""
    return Tensor(places(height // 2, width // 2))


class Denoise(control.ControlledDenoise):
    """Velocity at noisy latents. ``guidance`` is used by guidance-distilled networks (FLUX.1-dev) only.

    Shapes: latents float [B, C, H, W], sigma float32 [B], prompt_embeds [B, L, D], pooled_prompt_embeds [B, P],
    guidance float32 [B], edit_latents [B, M, 4C], edit_places int32 [B, M, 3], control_... of `shared.control` ->
    velocity float32 [B, C, H, W]. The network computes in ``dtype``. The tokens of references (FLUX.1-Kontext) follow
    those of the image.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "pooled_prompt_embeds", "guidance?", "edit_latents?",
                    "edit_places?", *control.SLOTS)
    output_params = ("velocity",)

    def attach(self, pipe):
        super().attach(pipe)
        self.is_guided = bool(pipe.config("dit")["guidance_embeds"])

    def construct(self, latents, sigma, prompt_embeds, pooled_prompt_embeds, guidance=None, edit_latents=None,
                  edit_places=None, control_latents=None, control_modes=None, control_scales=None):
        height, width = latents.shape[2], latents.shape[3]
        tokens, ids = pack(latents), image_ids(height, width)
        image_tokens = tokens.shape[1]
        embeds, pooled = prompt_embeds.astype(self.dtype), pooled_prompt_embeds.astype(self.dtype)
        samples = single_samples = None
        if control_latents is not None and self.is_wide:
            tokens = ops.cat((tokens.astype(self.dtype), control_latents.astype(self.dtype).squeeze(1)), 2)
        elif control_latents is not None:
            conditions, modes, scales = self.each(control_latents, control_modes, control_scales)
            for k in range(len(conditions)):
                found, found_single = self.controlnet(tokens.astype(self.dtype), conditions[k], modes[k], scales[k],
                                                      sigma, guidance, pooled, embeds, ids)
                samples, single_samples = control.added(samples, found), control.added(single_samples, found_single)
        if not self.is_guided:
            guidance = None
        has_references = edit_latents is not None and edit_latents.shape[1] > 0
        if has_references:
            tokens = ops.cat((tokens, edit_latents.astype(tokens.dtype)), 1)
            ids = ops.broadcast_to(ids.expand_dims(0), (latents.shape[0], image_tokens, 3))
            ids = ops.cat((ids, edit_places.astype(ms.float32)), 1)
        velocity = self.dit(
            hidden_states=tokens.astype(self.dtype),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=ops.zeros((prompt_embeds.shape[1], 3), ms.float32),
            img_ids=ids,
            return_dict=False,
            controlnet_block_samples=samples,
            controlnet_single_block_samples=single_samples,
        )[0]
        if has_references:
            velocity = network.part(velocity, image_tokens)[0]
        return (unpack(velocity, height, width).astype(ms.float32),)
