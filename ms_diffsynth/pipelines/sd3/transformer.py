"""Stable Diffusion 3's transformer: mindone's blocks under a ``construct`` of our own.

mindone's puts patches together by ``mint.einsum``, which MindSpore 2.10 has for Ascend only, and has the table of
positions as a weight.

Shape legend: B batch, L text tokens, N image tokens, D width, p patch size.
"""
from __future__ import annotations

from ms_diffsynth.pipelines.quiet import quiet_imports

with quiet_imports():
    from mindone.diffusers.models.transformers import transformer_sd3 as mindone


class SD3Transformer(mindone.SD3Transformer2DModel):
    """Velocity of latents."""

    buffer_names = ("pos_embed.pos_embed",)

    def construct(self, hidden_states, encoder_hidden_states, pooled_projections, timestep):
        """hidden_states [B, C, H, W], encoder_hidden_states [B, L, D'], pooled_projections [B, P], timestep float32 [B]
        (1000 sigma) -> velocity [B, C, H, W]."""
        batch, _, height, width = hidden_states.shape
        image = self.pos_embed(hidden_states)  # [B, N, D]
        temb = self.time_text_embed(timestep, pooled_projections)  # [B, D]; float32 up to the sinusoids
        text = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        patches = self.proj_out(self.norm_out(image, temb))  # [B, N, p p C]
        p = self.pos_embed.patch_size
        patches = patches.reshape(batch, height // p, width // p, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)
