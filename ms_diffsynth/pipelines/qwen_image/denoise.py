"""How Qwen-Image's transformer is called: latents are packed into tokens, and the velocity is unpacked again."""
from __future__ import annotations

import mindspore as ms

from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.pipelines.qwen_image.rotary import edit_table, image_table
from ms_diffsynth.units import TensorUnit


class Denoise(TensorUnit):
    """Velocity at noisy latents.

    Shapes: latents float [B, C, H, W], sigma float32 [B], prompt_embeds [B, L, D], prompt_mask float32 [B, L] (1 for
    text, 0 for padding; absent: all text), edit_latents [B, M, 4C], edit_places int32 [B, M, 4] -> velocity float32
    [B, C, H, W]. The network computes in ``dtype``. The tokens of references (Qwen-Image-Edit) follow the image's.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "prompt_mask?", "edit_latents?", "edit_places?")
    output_params = ("velocity",)
    onload_model_names = ("dit",)

    def attach(self, pipe):
        super().attach(pipe)
        self.axes = tuple(pipe.config("dit")["axes_dims_rope"])

    def construct(self, latents, sigma, prompt_embeds, prompt_mask=None, edit_latents=None, edit_places=None):
        height, width = latents.shape[2], latents.shape[3]
        references = None
        if edit_latents is not None and edit_latents.shape[1] > 0:
            references = edit_latents.astype(self.dtype)
            cos, sin = edit_table(prompt_embeds.shape[1], height // 2, width // 2, edit_places, self.axes)
        else:
            cos, sin = image_table(prompt_embeds.shape[1], height // 2, width // 2, self.axes)
        tokens = self.dit(pack(latents).astype(self.dtype), sigma, prompt_embeds.astype(self.dtype), cos, sin,
                          prompt_mask, references)
        return (unpack(tokens, height, width).astype(ms.float32),)
