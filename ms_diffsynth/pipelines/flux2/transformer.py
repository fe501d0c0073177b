"""mindone's FLUX.2 transformer, so that it compiles, for klein and dev: its modules under another ``construct``.

As in `pipelines.flux.transformer`, an object is given a subclass of its own class: parameters, their names and their
places stay. What changes: rotary tables come from the host (`rotary`), a network without embedded guidance (klein) has
none, and sigma stays float32 up to its sinusoids (mindone casts it to the compute dtype, where bfloat16 keeps 8 bits
of it).

Shape legend: B batch, L text tokens, N image tokens (picture and edit pictures), S = L + N, D width, H heads.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, mint, nn, ops

from ms_diffsynth.ops import install_cpu_kernels
from ms_diffsynth.pipelines.flux2.template import check_widths
from ms_diffsynth.pipelines.quiet import quiet_imports
from ms_diffsynth.pipelines.qwen_image.rotary import rotate_pairs

install_cpu_kernels()  # a network of mindone is adapted while it is imported

with quiet_imports():
    from mindone.diffusers.models import layers_compat
    from mindone.diffusers.models.transformers import transformer_flux2 as mindone


class Flux2Block(mindone.Flux2TransformerBlock):
    """One block of two streams that attend to each other."""

    def construct(self, image, text, image_modulation, text_modulation, table, template):
        """image [B, N, D], text [B, L, D], modulations [B, 1, 6 D], table of `rotary`, template of `flux2.template`."""
        shift, scale, gate, shift_2, scale_2, gate_2 = mint.chunk(image_modulation, 6, -1)
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = mint.chunk(text_modulation, 6, -1)
        image_attended, text_attended = joint_attention(
            self.attn, self.norm1(image) * (1 + scale) + shift,
            self.norm1_context(text) * (1 + text_scale) + text_shift, table, template)
        image = image + gate * image_attended
        text = text + text_gate * text_attended
        image = image + gate_2 * feed_forward(self.ff, self.norm2(image) * (1 + scale_2) + shift_2, template, "ff.")
        text = text + text_gate_2 * feed_forward(
            self.ff_context, self.norm2_context(text) * (1 + text_scale_2) + text_shift_2, template, "ff_context.")
        return image, _in_range(text)


class Flux2SingleBlock(mindone.Flux2SingleTransformerBlock):
    """One block of text and picture as a single stream: attention and feed-forward side by side."""

    def construct(self, x, modulation, table, template):
        """x [B, S, D], modulation [B, 1, 3 D], table of `rotary`, template of `flux2.template`."""
        shift, scale, gate = mint.chunk(modulation, 3, -1)
        return _in_range(x + gate * parallel_attention(self.attn, self.norm(x) * (1 + scale) + shift, table, template))


class Flux2Transformer(mindone.Flux2Transformer2DModel):
    """Velocity of packed latents. All blocks of a kind share one modulation."""

    def construct(self, tokens, sigma, guidance, prompt_embeds, table, template):
        """tokens [B, N, C], sigma and guidance float32 [B] (None for klein), prompt_embeds [B, L, D'] -> [B, N, C].

        template: what a template has for each block; see `flux2.template.by_block`.
        """
        image, text = self.x_embedder(tokens), self.context_embedder(prompt_embeds)
        temb = self.embed(self.time_guidance_embed.timestep_embedder, sigma, image.dtype)
        if guidance is not None:
            temb = temb + self.embed(self.time_guidance_embed.guidance_embedder, guidance, image.dtype)
        image_modulation = _modulation(self.double_stream_modulation_img, temb)
        text_modulation = _modulation(self.double_stream_modulation_txt, temb)
        for i in range(len(self.transformer_blocks)):
            image, text = self.transformer_blocks[i](image, text, image_modulation, text_modulation, table,
                                                     of_block(template, f"double_{i}"))
        modulation, text_tokens = _modulation(self.single_stream_modulation, temb), text.shape[1]
        x = ops.cat((text, image), 1)
        for i in range(len(self.single_transformer_blocks)):
            x = self.single_transformer_blocks[i](x, modulation, table, of_block(template, f"single_{i}"))
        return self.proj_out(self.norm_out(x[:, text_tokens:], temb))

    def embed(self, embedder, number, dtype):
        """A number of [0, 1], or a guidance scale, as a vector [B, D]: sinusoids in float32 of a thousand times it."""
        return embedder(self.time_guidance_embed.time_proj(number.astype(ms.float32) * 1000).astype(dtype))


def joint_attention(attn: nn.Cell, image: Tensor, text: Tensor, table: Tensor,
                    template: dict) -> tuple[Tensor, Tensor]:
    """Attention over text and image tokens together. Source: mindone 0.5.0, Flux2AttnProcessor."""
    heads, text_tokens = attn.heads, text.shape[1]
    text_q = attn.norm_added_q(_heads(linear(attn.add_q_proj, text, template, "attn.add_q_proj"), heads))
    text_k = attn.norm_added_k(_heads(linear(attn.add_k_proj, text, template, "attn.add_k_proj"), heads))
    text_v = _heads(linear(attn.add_v_proj, text, template, "attn.add_v_proj"), heads)
    q = attn.norm_q(_heads(linear(attn.to_q, image, template, "attn.to_q"), heads))
    k = attn.norm_k(_heads(linear(attn.to_k, image, template, "attn.to_k"), heads))
    v = _heads(linear(attn.to_v, image, template, "attn.to_v"), heads)
    out = attend(ops.cat((text_q, q), 1), ops.cat((text_k, k), 1), ops.cat((text_v, v), 1), table, template)
    return (linear(attn.to_out[0], out[:, text_tokens:], template, "attn.to_out.0"),
            linear(attn.to_add_out, out[:, :text_tokens], template, "attn.to_add_out"))


def parallel_attention(attn: nn.Cell, x: Tensor, table: Tensor, template: dict) -> Tensor:
    """Attention and feed-forward, one projection in and out. Source: mindone 0.5.0, Flux2ParallelSelfAttnProcessor."""
    heads, width = attn.heads, attn.inner_dim
    projected = linear(attn.to_qkv_mlp_proj, x, template, "attn.to_qkv_mlp_proj")
    q, k, v = mint.chunk(projected[..., :3 * width], 3, -1)
    out = attend(attn.norm_q(_heads(q, heads)), attn.norm_k(_heads(k, heads)), _heads(v, heads), table, template)
    return linear(attn.to_out, ops.cat((out, attn.mlp_act_fn(projected[..., 3 * width:])), -1), template, "attn.to_out")


def feed_forward(ff: nn.Cell, x: Tensor, template: dict, name: str) -> Tensor:
    """Source: mindone 0.5.0, Flux2FeedForward."""
    x = ff.act_fn(linear(ff.linear_in, x, template, name + "linear_in"))
    return linear(ff.linear_out, x, template, name + "linear_out")


def linear(layer: nn.Cell, x: Tensor, template: dict, name: str) -> Tensor:
    """A linear layer, with the LoRA a template has for it: x [B, S, in] -> [B, S, out]."""
    y = layer(x)
    if name in template and check_widths(name, template[name][0].shape, template[name][1].shape, x.shape, y.shape):
        a, b = template[name]
        y = y + ops.matmul(ops.matmul(x, a.swapaxes(-1, -2)), b.swapaxes(-1, -2))
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, template: dict) -> Tensor:
    """Rotate q and k by their positions, then attend: [B, S, H, D / H] each -> [B, S, D].

    No mask: padding of the text is attended to, as FLUX.2 was trained. Keys and values of a template have no position,
    so they join after the rotation. Source of their order: DiffSynth-Studio 2.1.12, Flux2DiT.
    """
    q, k = rotate_pairs(q, table), rotate_pairs(k, table)
    if "kv" in template:
        k, v = ops.cat((k, template["kv"][0]), 1), ops.cat((v, template["kv"][1]), 1)
    out = layers_compat.scaled_dot_product_attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[1], -1).astype(v.dtype)


def of_block(template: dict, name: str) -> dict:
    """What a template has for one block."""
    return template[name] if name in template else {}


def _heads(x, heads):
    return x.reshape(x.shape[0], x.shape[1], heads, -1)


def _modulation(modulation, temb):
    """Shifts, scales and gates side by side in one Tensor, which a recomputed block can take: [B, 1, 6 D or 3 D]."""
    return modulation.linear(modulation.act_fn(temb)).expand_dims(1)


def _in_range(x):
    return ops.clamp(x, -65504, 65504) if x.dtype == ms.float16 else x


def build_transformer(config: dict) -> Flux2Transformer:
    """The network of a ``config.json``, its weights still to come.

    Raises: TypeError for a configuration that mindone 0.5.0 does not know.
    """
    config = dict(config)
    is_guided = config.pop("guidance_embeds", True)  # dev's config.json is older than the setting
    dit = mindone.Flux2Transformer2DModel(**config)
    dit.register_to_config(guidance_embeds=is_guided)
    if not is_guided:
        del dit.time_guidance_embed.guidance_embedder
    dit.__class__ = Flux2Transformer
    for block in dit.transformer_blocks:
        block.__class__ = Flux2Block
    for block in dit.single_transformer_blocks:
        block.__class__ = Flux2SingleBlock
    return dit
