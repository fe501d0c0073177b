"""FLUX.2's transformer, for klein and dev: mindone's modules and weights, computed by blocks of our own.

As in `pipelines.flux.transformer`, an object is given a subclass of its own class: parameters, their names and their
places stay. What changes: equal blocks are one cell that takes the weights as arguments (`nn.blocks`), and what a
template has for a block with them; rotary tables come from the host (`rotary`); a network without embedded guidance
(klein) has none; sigma stays float32 up to its sinusoids (mindone casts it to the compute dtype, where bfloat16 keeps 8
bits of it).

Shape legend: B batch, L text tokens, N image tokens (image and edit images), S = L + N, D width, H heads.
"""
from __future__ import annotations

from functools import partial

import mindspore as ms
from mindspore import mint, nn

from ms_diffsynth.models import arguments
from ms_diffsynth.nn.blocks import Arranged, Kind, at, by_head
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.flux2.template import JOINT_LAYERS, SINGLE_LAYERS, joined
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import check_axes

with quiet_imports():
    from mindone.diffusers.models.transformers import transformer_flux2 as mindone


class Adapted(nn.Cell):
    """A linear layer, and what a template adds: x A^T B^T. Weights are those of the layer, and pairs (A, B)."""

    def __init__(self, base: nn.Cell):
        super().__init__(auto_prefix=False)
        self.base = base

    def construct(self, x, weights, lora):
        y = self.base(x, weights[0], lora)
        for a, b in weights[1]:
            y = y + network.low_rank_each(x, a, b)
        return y


class DoubleBlock(nn.Cell):
    """Image and text as two streams that attend to each other; the weights are those of ``NAMES``, in that order.

    No mask: padding of the text is attended to, as FLUX.2 was trained. Keys and values of a template have no position,
    so they join after the rotation. Source of their order: DiffSynth-Studio 2.1.12, Flux2DiT.
    """

    LINEAR = JOINT_LAYERS
    NAMES = (*LINEAR, "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")

    def __init__(self, layers: list[nn.Cell], heads: int, eps: float, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        (self.to_q, self.to_k, self.to_v, self.to_out, self.text_q, self.text_k, self.text_v, self.text_out, self.up,
         self.down, self.text_up, self.text_down,
         norm, _, _, _, self.matrices) = layers
        self.heads, self.eps = heads, eps
        self.norm_eps = norm.eps
        self.attend, self.is_float16 = network.attention(dtype), dtype == ms.float16

    def construct(self, image, text, modulation, text_modulation, cos, sin, weights, lora):
        """image [B, N, D], text [B, L, D], modulations [B, 6 D], cos and sin of `network.positions`, weights of
        `template.joined` -> image, text."""
        (w_q, w_k, w_v, w_out, w_text_q, w_text_k, w_text_v, w_text_out, w_up, w_down, w_text_up, w_text_down,
         w_norm_q, w_norm_k, w_text_norm_q, w_text_norm_k) = weights[0]
        lora = self.matrices(lora)
        shift, scale, gate, shift_2, scale_2, gate_2 = network.chunks(modulation, 6)
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = network.chunks(text_modulation, 6)
        (image, x), (text, y) = network.shared(image, 2), network.shared(text, 2)
        x_q, x_k, x_v = network.shared(network.layer_norm_modulate(x, scale, shift, self.eps), 3)
        y_q, y_k, y_v = network.shared(network.layer_norm_modulate(y, text_scale, text_shift, self.eps), 3)
        q = network.norm_rotate_joint(
            by_head(self.text_q(y_q, w_text_q, lora), self.heads), by_head(self.to_q(x_q, w_q, lora), self.heads),
            w_text_norm_q[0], w_norm_q[0], cos, sin, self.norm_eps)
        k = network.norm_rotate_joint(
            by_head(self.text_k(y_k, w_text_k, lora), self.heads), by_head(self.to_k(x_k, w_k, lora), self.heads),
            w_text_norm_k[0], w_norm_k[0], cos, sin, self.norm_eps)
        v = network.join(by_head(self.text_v(y_v, w_text_v, lora), self.heads),
                         by_head(self.to_v(x_v, w_v, lora), self.heads))
        for keys, values in weights[1]:
            k, v = network.join(k, keys), network.join(v, values)
        y, x = network.part(self.attend(q, k, v), text.shape[1])
        image, x = network.shared(network.gate_add(image, gate, self.to_out(x, w_out, lora)), 2)
        text, y = network.shared(network.gate_add(text, text_gate, self.text_out(y, w_text_out, lora)), 2)
        x = self.up(network.layer_norm_modulate(x, scale_2, shift_2, self.eps), w_up, lora)
        y = self.text_up(network.layer_norm_modulate(y, text_scale_2, text_shift_2, self.eps), w_text_up, lora)
        image = network.gate_add(image, gate_2, self.down(network.swiglu(x), w_down, lora))
        text = network.gate_add(text, text_gate_2, self.text_down(network.swiglu(y), w_text_down, lora))
        if self.is_float16:
            text = text.clamp(-65504, 65504)
        return image, text


class SingleBlock(nn.Cell):
    """Text and image as one stream: attention and feed-forward side by side, with one projection in and one out."""

    LINEAR = SINGLE_LAYERS
    NAMES = (*LINEAR, "attn.norm_q", "attn.norm_k")

    def __init__(self, layers: list[nn.Cell], heads: int, eps: float, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.project, self.out, norm, _, self.matrices = layers
        self.heads, self.eps, self.norm_eps = heads, eps, norm.eps
        self.attend, self.is_float16 = network.attention(dtype), dtype == ms.float16

    def construct(self, x, modulation, cos, sin, weights, lora):
        """x [B, S, D], modulation [B, 3 D], the rest as for `DoubleBlock` -> [B, S, D]."""
        w_project, w_out, w_norm_q, w_norm_k = weights[0]
        lora = self.matrices(lora)
        shift, scale, gate = network.chunks(modulation, 3)
        (x, y), width = network.shared(x, 2), x.shape[2]
        projected = self.project(network.layer_norm_modulate(y, scale, shift, self.eps), w_project, lora)
        q, k, v, hidden = network.parts(projected, (width, width, width, projected.shape[2] - 3 * width))
        q = network.norm_rotate(by_head(q, self.heads), w_norm_q[0], cos, sin, self.norm_eps)
        k = network.norm_rotate(by_head(k, self.heads), w_norm_k[0], cos, sin, self.norm_eps)
        v = by_head(v, self.heads)
        for keys, values in weights[1]:
            k, v = network.join(k, keys), network.join(v, values)
        hidden = network.join_last(self.attend(q, k, v), network.swiglu(hidden))
        x = network.gate_add(x, gate, self.out(hidden, w_out, lora))
        if self.is_float16:
            x = x.clamp(-65504, 65504)
        return x


class Flux2Block(mindone.Flux2TransformerBlock):
    """The weights of a double block."""

    is_arranged = True


class Flux2SingleBlock(mindone.Flux2SingleTransformerBlock):
    """The weights of a single block."""

    is_arranged = True


class Flux2Transformer(Arranged, mindone.Flux2Transformer2DModel):
    """Velocity of packed latents. All blocks of a kind share one modulation."""

    def construct(self, tokens, sigma, guidance, prompt_embeds, cos, sin, template):
        """tokens [B, N, C], sigma and guidance float32 [B] (None for klein), prompt_embeds [B, L, D'], cos and sin
        float32 [B or 1, S, D / H] of `rotary` -> [B, N, C].

        template: what a template has for each block; see `flux2.template.by_block`.
        """
        image, text = self.x_embedder(tokens), self.context_embedder(prompt_embeds)
        temb = self.embed(self.time_guidance_embed.timestep_embedder, sigma, image.dtype)
        if guidance is not None:
            temb = temb + self.embed(self.time_guidance_embed.guidance_embedder, guidance, image.dtype)
        emb = mint.nn.functional.silu(temb)
        modulation = self.double_stream_modulation_img.linear(emb)
        text_modulation = self.double_stream_modulation_txt.linear(emb)
        cos = network.positions(cos, image.shape[0], self.heads, image.dtype)
        sin = network.positions(sin, image.shape[0], self.heads, image.dtype)
        lora = self.lora(image) if self.has_lora else self.no_lora
        cells, cell_of, weights, places = self.double_cells, self.double_cell_of, self.double_weights, self.double_lora
        for i in range(len(cell_of)):
            image, text = cells[cell_of[i]]((image, text, modulation, text_modulation, cos, sin),
                                            joined(weights[i], template, f"double_{i}", self.double_shapes),
                                            lora[places[i]])
        x, text_tokens = network.join(text, image), text.shape[1]
        modulation = self.single_stream_modulation.linear(emb)
        cells, cell_of, weights, places = self.single_cells, self.single_cell_of, self.single_weights, self.single_lora
        for i in range(len(cell_of)):
            x = cells[cell_of[i]]((x, modulation, cos, sin),
                                  joined(weights[i], template, f"single_{i}", self.single_shapes), lora[places[i]])
        image = network.part(x, text_tokens)[1]
        scale, shift = network.chunks(self.norm_out.linear(emb), 2)
        return self.proj_out(network.layer_norm_modulate(image, scale, shift, self.eps))

    def embed(self, embedder, number, dtype):
        """A number of [0, 1], or a guidance scale, as a vector [B, D]: sinusoids in float32 of a thousand times it."""
        return embedder(self.time_guidance_embed.time_proj(number.astype(ms.float32) * 1000).astype(dtype))

    def kinds(self):
        return {"double": Kind("transformer_blocks", DoubleBlock.NAMES, partial(self._build, DoubleBlock)),
                "single": Kind("single_transformer_blocks", SingleBlock.NAMES, partial(self._build, SingleBlock))}

    def _build(self, kind, _, layers):
        # the dtype of a norm, because the weights of linear layers may be stored in 8 bits
        dtype = self.transformer_blocks[0].attn.norm_q.weight.dtype
        layers = [*map(Adapted, layers[:len(kind.LINEAR)]), *layers[len(kind.LINEAR):]]
        return kind(layers, self.heads, self.eps, dtype)


def _shapes(kind, blocks):
    """(out, in) of the linear layers of a block."""
    return tuple(layer.weight.shape for layer in at(blocks[0], kind.LINEAR)) if len(blocks) else ()


def build_transformer(config: dict) -> Flux2Transformer:
    """The network of a ``config.json``, its weights still to come.

    Raises: WeightError for a setting that cannot be meant.
    """
    config = dict(config)
    is_guided = config.pop("guidance_embeds", True)  # dev's config.json is older than the setting
    given = arguments(mindone.Flux2Transformer2DModel, config)
    check_axes(given)
    dit = mindone.Flux2Transformer2DModel(**given)
    dit.register_to_config(guidance_embeds=is_guided)
    if not is_guided:
        del dit.time_guidance_embed.guidance_embedder
    dit.__class__ = Flux2Transformer
    dit.heads, dit.eps = dit.config.num_attention_heads, dit.config.eps
    dit.double_shapes = _shapes(DoubleBlock, dit.transformer_blocks)
    dit.single_shapes = _shapes(SingleBlock, dit.single_transformer_blocks)
    for block in dit.transformer_blocks:
        block.__class__ = Flux2Block
    for block in dit.single_transformer_blocks:
        block.__class__ = Flux2SingleBlock
    return dit
