"""mindone's Qwen-Image transformer, so that it compiles and has gradients: its modules under another ``construct``.

As in `pipelines.flux.transformer`, an object is given a subclass of its own class: parameters, their names and their
places stay. What changes: rotary positions are real (`rotary`), text may be padded, and sigma stays float32 up to its
sinusoids (mindone casts it to the compute dtype, where bfloat16 keeps 8 bits of it).

Shape legend: B batch, L text tokens, N image tokens, S = L + N, D width, H heads.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, mint, nn, ops

from ms_diffsynth.ops import install_cpu_kernels
from ms_diffsynth.pipelines.quiet import quiet_imports
from ms_diffsynth.pipelines.qwen_image.rotary import rotate_pairs

install_cpu_kernels()  # a network of mindone is adapted while it is imported

with quiet_imports():
    from mindone.diffusers.models import layers_compat
    from mindone.diffusers.models.transformers import transformer_qwenimage as mindone


class QwenImageBlock(mindone.QwenImageTransformerBlock):
    """One block of two streams that attend to each other."""

    def construct(self, image, text, temb, table, mask):
        """image [B, N, D], text [B, L, D], temb [B, D], table of `rotary`, mask of `denoise` or None."""
        image_shift, image_scale, image_gate, image_shift_2, image_scale_2, image_gate_2 = _six(self.img_mod(temb))
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = _six(self.txt_mod(temb))
        image_attended, text_attended = joint_attention(
            self.attn, self.img_norm1(image) * (1 + image_scale) + image_shift,
            self.txt_norm1(text) * (1 + text_scale) + text_shift, table, mask)
        image = image + image_gate * image_attended
        text = text + text_gate * text_attended
        image = image + image_gate_2 * self.img_mlp(self.img_norm2(image) * (1 + image_scale_2) + image_shift_2)
        text = text + text_gate_2 * self.txt_mlp(self.txt_norm2(text) * (1 + text_scale_2) + text_shift_2)
        if image.dtype == ms.float16:
            image, text = ops.clamp(image, -65504, 65504), ops.clamp(text, -65504, 65504)
        return image, text


class QwenImageTransformer(mindone.QwenImageTransformer2DModel):
    """Velocity of packed latents."""

    def construct(self, tokens, sigma, prompt_embeds, table, mask):
        """tokens [B, N, 4C], sigma float32 [B], prompt_embeds [B, L, D'] -> velocity [B, N, 4C]."""
        image = self.img_in(tokens)
        text = self.txt_in(self.txt_norm(prompt_embeds))
        sinusoids = self.time_text_embed.time_proj(sigma.astype(ms.float32))
        temb = self.time_text_embed.timestep_embedder(sinusoids.astype(image.dtype))
        for block in self.transformer_blocks:
            image, text = block(image, text, temb, table, mask)
        return self.proj_out(self.norm_out(image, temb))


def joint_attention(attn: nn.Cell, image: Tensor, text: Tensor, table: Tensor,
                    mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over text and image tokens together, by the layers of mindone's ``Attention``.

    Source: mindone 0.5.0, QwenDoubleStreamAttnProcessor2_0.
    """
    heads, text_tokens = attn.heads, text.shape[1]
    text_q, q = attn.norm_added_q(_heads(attn.add_q_proj(text), heads)), attn.norm_q(_heads(attn.to_q(image), heads))
    text_k, k = attn.norm_added_k(_heads(attn.add_k_proj(text), heads)), attn.norm_k(_heads(attn.to_k(image), heads))
    text_v, v = _heads(attn.add_v_proj(text), heads), _heads(attn.to_v(image), heads)
    q, k, v = ops.cat((text_q, q), 1), ops.cat((text_k, k), 1), ops.cat((text_v, v), 1)
    q, k = rotate_pairs(q, table), rotate_pairs(k, table)
    taken = None if mask is None else mask > 0.5
    out = layers_compat.scaled_dot_product_attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), taken)
    out = out.swapaxes(1, 2).reshape(q.shape[0], q.shape[1], -1).astype(image.dtype)
    return attn.to_out[0](out[:, text_tokens:]), attn.to_add_out(out[:, :text_tokens])


def _heads(x, heads):
    return x.reshape(x.shape[0], x.shape[1], heads, -1)


def _six(modulation):
    return mint.chunk(modulation.expand_dims(1), 6, -1)


def build_transformer(config: dict) -> QwenImageTransformer:
    """The network of a ``config.json``, its weights still to come.

    Raises: TypeError for a configuration that mindone 0.5.0 does not know.
    """
    dit = mindone.QwenImageTransformer2DModel(**config)
    del dit.pos_embed  # complex tables of 4096 positions that nothing reads any more
    dit.__class__ = QwenImageTransformer
    for block in dit.transformer_blocks:
        block.__class__ = QwenImageBlock
    return dit
