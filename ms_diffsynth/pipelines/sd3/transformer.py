"""Stable Diffusion 3's transformer, of mindone's blocks.

mindone's own network puts patches together by ``mint.einsum``, which MindSpore 2.10 has for Ascend only, computes the
table of positions in float64 on the device although a checkpoint holds it, and takes it for a weight.

Shape legend: B batch, L text tokens, N image tokens, D width, p patch size, S side of the table of positions.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, mint, nn
from mindspore.common.initializer import initializer

from ms_diffsynth.pipelines.quiet import quiet_imports

with quiet_imports():
    from mindone.diffusers.models.attention import JointTransformerBlock
    from mindone.diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
    from mindone.diffusers.models.normalization import AdaLayerNormContinuous


class PatchEmbed(nn.Cell):
    """Patches of latents as tokens, with the middle of a table of S x S positions added.

    Shapes: [B, C, H, W] -> [B, N, D]; H and W are at most p S.
    """

    buffer_names = ("pos_embed",)

    def __init__(self, patch_size: int, in_channels: int, width: int, side: int):
        super().__init__()
        self.patch_size, self.side = patch_size, side
        self.proj = mint.nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = Parameter(initializer("zeros", (1, side * side, width), ms.float32), "pos_embed", False)

    def construct(self, latents):
        patches = self.proj(latents)
        batch, width, rows, columns = patches.shape
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.reshape(1, self.side, self.side, width)[:, top:top + rows, left:left + columns]
        tokens = patches.reshape(batch, width, rows * columns).swapaxes(1, 2)
        return (tokens + table.reshape(1, rows * columns, width)).astype(tokens.dtype)


class SD3Transformer(nn.Cell):
    """Velocity of latents. The arguments are the settings of diffusers' SD3Transformer2DModel, without its defaults.

    Args:
        sample_size: side of the latents in training; the table of positions in the checkpoint is made for it.
        dual_attention_layers: blocks with a second attention, of the picture alone (SD3.5-medium).
        qk_norm: ``rms_norm`` of queries and keys (SD3.5), or None.
    """

    def __init__(self, *, sample_size: int, patch_size: int, in_channels: int, num_layers: int, attention_head_dim: int,
                 num_attention_heads: int, joint_attention_dim: int, caption_projection_dim: int,
                 pooled_projection_dim: int, out_channels: int, pos_embed_max_size: int,
                 dual_attention_layers: tuple[int, ...] = (), qk_norm: str | None = None):
        super().__init__()
        width = attention_head_dim * num_attention_heads
        self.config = {
            "_class_name": "SD3Transformer2DModel", "sample_size": sample_size, "patch_size": patch_size,
            "in_channels": in_channels, "num_layers": num_layers, "attention_head_dim": attention_head_dim,
            "num_attention_heads": num_attention_heads, "joint_attention_dim": joint_attention_dim,
            "caption_projection_dim": caption_projection_dim, "pooled_projection_dim": pooled_projection_dim,
            "out_channels": out_channels, "pos_embed_max_size": pos_embed_max_size,
            "dual_attention_layers": dual_attention_layers, "qk_norm": qk_norm}
        self.out_channels, self.patch_size = out_channels, patch_size
        self.pos_embed = PatchEmbed(patch_size, in_channels, width, pos_embed_max_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(width, pooled_projection_dim)
        self.context_embedder = mint.nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.CellList([
            JointTransformerBlock(width, num_attention_heads, attention_head_dim, context_pre_only=k == num_layers - 1,
                                  qk_norm=qk_norm, use_dual_attention=k in dual_attention_layers)
            for k in range(num_layers)])
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = mint.nn.Linear(width, patch_size * patch_size * out_channels)

    def construct(self, latents, prompt_embeds, pooled_prompt_embeds, timestep):
        """latents [B, C, H, W], prompt_embeds [B, L, D'], pooled_prompt_embeds [B, P], timestep float32 [B] (1000
        sigma), float32 up to its sinusoids -> velocity [B, C, H, W]."""
        batch, _, height, width = latents.shape
        image, text = self.pos_embed(latents), self.context_embedder(prompt_embeds)
        temb = self.time_text_embed(timestep, pooled_prompt_embeds)
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        patches, p = self.proj_out(self.norm_out(image, temb)), self.patch_size  # [B, N, p p C]
        patches = patches.reshape(batch, height // p, width // p, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)
