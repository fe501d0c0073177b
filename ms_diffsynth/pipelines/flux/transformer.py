"""FLUX.1's transformer: mindone's modules and weights, computed by blocks of our own.

As in `pipelines.flux2.transformer`, an object is given a subclass of its own class: parameters, their names and their
places stay. What changes: equal blocks are one cell that takes the weights as arguments (`nn.functional`), so that
they are compiled once and recompute as a whole; no cell is given to a plain object (mindone's attention processor; on
Ascend MindSpore 2.10 cannot differentiate that: "Invalid datatype:26"); sigma and guidance stay float32 up to their
sinusoids (mindone casts them to the compute dtype, where bfloat16 keeps 8 bits of them); SiLU(temb) is computed once.

Shape legend: B batch, L text tokens, N image tokens, S = L + N, D width, H heads.
"""
from __future__ import annotations

from functools import partial

import mindspore as ms
from mindspore import mint, nn

from ms_diffsynth.nn import functional
from ms_diffsynth.nn.blocks import Arranged, Kind, at
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.quiet import quiet_imports

with quiet_imports():
    from mindone.diffusers.models.transformers import transformer_flux as mindone

EPS = 1e-6  # of the norms without weights, in mindone as in diffusers


class DoubleBlock(nn.Cell):
    """Text and image as two streams that attend to each other; the weights are those of ``NAMES``, in that order."""

    LINEAR = ("norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj",
              "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2",
              "ff_context.net.0.proj", "ff_context.net.2")
    NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")

    def __init__(self, layers: list[nn.Cell], heads: int, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        (self.modulate, self.text_modulate, self.to_q, self.to_k, self.to_v, self.text_q, self.text_k, self.text_v,
         self.to_out, self.text_out, self.up, self.down, self.text_up, self.text_down,
         self.norm_q, self.norm_k, self.text_norm_q, self.text_norm_k) = layers
        self.heads, self.attend, self.is_float16 = heads, network.attention(dtype), dtype == ms.float16

    def construct(self, text, image, emb, cos, sin, weights):
        """text [B, L, D], image [B, N, D], emb [B, D], cos and sin of `network.positions` -> text, image."""
        (w_modulate, w_text_modulate, w_q, w_k, w_v, w_text_q, w_text_k, w_text_v, w_out, w_text_out, w_up, w_down,
         w_text_up, w_text_down, w_norm_q, w_norm_k, w_text_norm_q, w_text_norm_k) = weights
        shift, scale, gate, shift_2, scale_2, gate_2 = network.chunks(self.modulate(emb, w_modulate), 6)
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = network.chunks(
            self.text_modulate(emb, w_text_modulate), 6)
        x = network.layer_norm_modulate(image, scale, shift, EPS)
        y = network.layer_norm_modulate(text, text_scale, text_shift, EPS)
        q = network.join(self.text_norm_q(_heads(self.text_q(y, w_text_q), self.heads), w_text_norm_q),
                         self.norm_q(_heads(self.to_q(x, w_q), self.heads), w_norm_q))
        k = network.join(self.text_norm_k(_heads(self.text_k(y, w_text_k), self.heads), w_text_norm_k),
                         self.norm_k(_heads(self.to_k(x, w_k), self.heads), w_norm_k))
        v = network.join(_heads(self.text_v(y, w_text_v), self.heads), _heads(self.to_v(x, w_v), self.heads))
        q, k = network.rotate(q, cos, sin), network.rotate(k, cos, sin)
        y, x = network.part(self.attend(q, k, v), text.shape[1])
        image = network.gate_add(image, gate, self.to_out(x, w_out))
        text = network.gate_add(text, text_gate, self.text_out(y, w_text_out))
        x = network.layer_norm_modulate(image, scale_2, shift_2, EPS)
        y = network.layer_norm_modulate(text, text_scale_2, text_shift_2, EPS)
        image = network.gate_add(image, gate_2, self.down(network.gelu_tanh(self.up(x, w_up)), w_down))
        text = network.gate_add(text, text_gate_2,
                                self.text_down(network.gelu_tanh(self.text_up(y, w_text_up)), w_text_down))
        if self.is_float16:
            text = text.clamp(-65504, 65504)
        return text, image


class SingleBlock(nn.Cell):
    """Text and image as one stream: attention and feed-forward side by side."""

    LINEAR = ("norm.linear", "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v", "proj_out")
    NORMS = ("attn.norm_q", "attn.norm_k")

    def __init__(self, layers: list[nn.Cell], heads: int, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        (self.modulate, self.up, self.to_q, self.to_k, self.to_v, self.out, self.norm_q, self.norm_k) = layers
        self.heads, self.attend, self.is_float16 = heads, network.attention(dtype), dtype == ms.float16

    def construct(self, x, emb, cos, sin, weights):
        """x [B, S, D], emb [B, D], cos and sin of `network.positions` -> [B, S, D]."""
        w_modulate, w_up, w_q, w_k, w_v, w_out, w_norm_q, w_norm_k = weights
        shift, scale, gate = network.chunks(self.modulate(emb, w_modulate), 3)
        y = network.layer_norm_modulate(x, scale, shift, EPS)
        q = self.norm_q(_heads(self.to_q(y, w_q), self.heads), w_norm_q)
        k = self.norm_k(_heads(self.to_k(y, w_k), self.heads), w_norm_k)
        q, k = network.rotate(q, cos, sin), network.rotate(k, cos, sin)
        attended = self.attend(q, k, _heads(self.to_v(y, w_v), self.heads))
        hidden = network.gelu_tanh(self.up(y, w_up))
        x = network.gate_add(x, gate, self.out(network.join_last(attended, hidden), w_out))
        if self.is_float16:
            x = x.clamp(-65504, 65504)
        return x


class FluxBlock(mindone.FluxTransformerBlock):
    """The weights of a double block."""

    is_arranged = True


class FluxSingleBlock(mindone.FluxSingleTransformerBlock):
    """The weights of a single block."""

    is_arranged = True


class FluxTransformer(Arranged, mindone.FluxTransformer2DModel):
    """Velocity of packed latents."""

    def construct(self, hidden_states, encoder_hidden_states=None, pooled_projections=None, timestep=None,
                  img_ids=None, txt_ids=None, guidance=None, return_dict=False):
        """hidden_states [B, N, C], encoder_hidden_states [B, L, D'], pooled_projections [B, P], timestep (sigma) and
        guidance float32 [B], img_ids [N, 3], txt_ids [L, 3] -> a tuple of the velocity [B, N, C]. The arguments are
        mindone's."""
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        embedders = self.time_text_embed
        temb = self.embed(embedders.timestep_embedder, timestep, image.dtype)
        if guidance is not None:
            temb = temb + self.embed(embedders.guidance_embedder, guidance, image.dtype)
        temb = temb + embedders.text_embedder(pooled_projections)
        emb = mint.nn.functional.silu(temb)
        cos, sin = self.pos_embed(mint.cat((txt_ids, img_ids), dim=0))
        cos = network.positions(cos.expand_dims(0), image.shape[0], self.heads, image.dtype)
        sin = network.positions(sin.expand_dims(0), image.shape[0], self.heads, image.dtype)
        cells, cell_of, weights = self.double_cells, self.double_cell_of, self.double_weights
        for i in range(len(cell_of)):
            text, image = cells[cell_of[i]]((text, image, emb, cos, sin), weights[i])
        x, text_tokens = network.join(text, image), text.shape[1]
        cells, cell_of, weights = self.single_cells, self.single_cell_of, self.single_weights
        for i in range(len(cell_of)):
            x = cells[cell_of[i]]((x, emb, cos, sin), weights[i])
        image = network.part(x, text_tokens)[1]
        scale, shift = network.chunks(self.norm_out.linear(emb), 2)
        return (self.proj_out(network.layer_norm_modulate(image, scale, shift, EPS)),)

    def embed(self, embedder, number, dtype):
        """A number of [0, 1], or a guidance scale, as a vector [B, D]: sinusoids in float32 of a thousand times it."""
        return embedder(self.time_text_embed.time_proj(number.astype(ms.float32) * 1000).astype(dtype))

    def kinds(self):
        return {"double": Kind("transformer_blocks", partial(_layers, DoubleBlock), partial(self._build, DoubleBlock)),
                "single": Kind("single_transformer_blocks", partial(_layers, SingleBlock),
                               partial(self._build, SingleBlock))}

    def _build(self, kind, layers):
        # a bias, because the weight may be stored in 8 bits
        return kind(layers, self.heads, self.x_embedder.bias.dtype)


def _layers(kind, block):
    return [*map(functional.linear, at(block, kind.LINEAR)), *map(functional.rms_norm, at(block, kind.NORMS))]


def _heads(x, heads):
    return x.reshape(x.shape[0], x.shape[1], heads, -1)


def use_own_blocks(dit: nn.Cell) -> nn.Cell:
    """Make ``dit``, a FluxTransformer2DModel, compute by the blocks of this module, and return it.

    Its parameters and their names stay, and its call as far as FLUX.1 itself goes: no IP adapter, no ControlNet. Call
    it before the network is compiled; a second call does nothing.

    Raises: TypeError for an attention that is not FLUX.1's own: another processor, fused projections, dropout.
    """
    for block in (*dit.transformer_blocks, *dit.single_transformer_blocks):
        attn = block.attn
        if type(attn.processor) is not mindone.FluxAttnProcessor or attn.fused_projections or attn.dropout:
            raise TypeError(f"{type(attn.processor).__name__}, fused_projections={attn.fused_projections}, dropout="
                            f"{attn.dropout}: expected a FluxAttnProcessor without either. Take the network as it is "
                            "loaded.")
    dit.__class__, dit.heads = FluxTransformer, dit.config.num_attention_heads
    for block in dit.transformer_blocks:
        block.__class__ = FluxBlock
    for block in dit.single_transformer_blocks:
        block.__class__ = FluxSingleBlock
    return dit


def build_transformer(config: dict) -> FluxTransformer:
    """The network of a ``config.json``, its weights still to come.

    Raises: TypeError for a configuration that mindone 0.5.0 does not know.
    """
    return use_own_blocks(mindone.FluxTransformer2DModel(**config))
