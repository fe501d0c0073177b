"""How Qwen-Image's transformer is called: latents are packed into tokens, and the velocity is unpacked again."""
from __future__ import annotations

import mindspore as ms

from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.pipelines.qwen_image.rotary import edit_table, image_table
from ms_diffsynth.pipelines.shared import control


class Denoise(control.ControlledDenoise):
    """Velocity at noisy latents.

    Shapes: latents float [B, C, H, W], sigma float32 [B], prompt_embeds [B, L, D], prompt_mask float32 [B, L] (1 for
    text, 0 for padding; absent: all text), edit_latents [B, M, 4C], edit_places int32 [B, M, 4], control_... of
    `shared.control` -> velocity float32 [B, C, H, W]. The network computes in ``dtype``. The tokens of references
    (Qwen-Image-Edit) follow the image's.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "prompt_mask?", "edit_latents?", "edit_places?",
                    *control.SLOTS)
    output_params = ("velocity",)

    def attach(self, pipe):
        super().attach(pipe)
        self.axes = tuple(pipe.config("dit")["axes_dims_rope"])

    def construct(self, latents, sigma, prompt_embeds, prompt_mask=None, edit_latents=None, edit_places=None,
                  control_latents=None, control_modes=None, control_scales=None):
        height, width = latents.shape[2], latents.shape[3]
        references = samples = None
        if edit_latents is not None and edit_latents.shape[1] > 0:
            references = edit_latents.astype(self.dtype)
            cos, sin = edit_table(prompt_embeds.shape[1], height // 2, width // 2, edit_places, self.axes)
        else:
            cos, sin = image_table(prompt_embeds.shape[1], height // 2, width // 2, self.axes)
        tokens, embeds = pack(latents).astype(self.dtype), prompt_embeds.astype(self.dtype)
        if control_latents is not None:
            conditions, _, scales = self.each(control_latents, control_modes, control_scales)
            for k in range(len(conditions)):
                samples = control.added(samples, self.controlnet(tokens, conditions[k], scales[k], sigma, embeds, cos,
                                                                 sin, prompt_mask))
        velocity = self.dit(tokens, sigma, embeds, cos, sin, prompt_mask, references, samples)
        return (unpack(velocity, height, width).astype(ms.float32),)
