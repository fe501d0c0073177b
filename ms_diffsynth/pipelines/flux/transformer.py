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
import numpy as np
from mindspore import Tensor, mint, nn, ops

from ms_diffsynth.models import arguments
from ms_diffsynth.nn.blocks import Arranged, Kind, by_head
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.shared import control
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import check_axes

with quiet_imports():
    from mindone.diffusers.models.transformers import transformer_flux as mindone

EPS = 1e-6  # of the norms without weights, in mindone as in diffusers


@ops.constexpr
def frequencies(axes, theta):
    """What the places of a token on each axis are multiplied by to be the angles of its rotation: float32 [axes, D],
    every frequency twice, for the two channels of a pair. Source: diffusers 0.42, get_1d_rotary_pos_embed."""
    table, column = np.zeros((len(axes), sum(axes)), np.float64), 0
    for axis, size in enumerate(axes):
        powers = theta ** (np.arange(0, size, 2) / size)
        table[axis, column:column + size] = np.repeat(1 / powers, 2)
        column += size
    return Tensor(table.astype(np.float32))


class DoubleBlock(nn.Cell):
    """Text and image as two streams that attend to each other; the weights are those of ``NAMES``, in that order."""

    NAMES = ("norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj",
             "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2",
             "ff_context.net.0.proj", "ff_context.net.2", "attn.norm_q", "attn.norm_k", "attn.norm_added_q",
             "attn.norm_added_k")

    def __init__(self, layers: list[nn.Cell], heads: int, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        (self.modulate, self.text_modulate, self.to_q, self.to_k, self.to_v, self.text_q, self.text_k, self.text_v,
         self.to_out, self.text_out, self.up, self.down, self.text_up, self.text_down,
         norm, _, _, _, self.matrices) = layers
        self.heads, self.attend, self.is_float16 = heads, network.attention(dtype), dtype == ms.float16
        self.norm_eps = norm.eps

    def construct(self, text, image, emb, cos, sin, weights, lora):
        """text [B, L, D], image [B, N, D], emb [B, D], cos and sin of `network.positions` -> text, image."""
        (w_modulate, w_text_modulate, w_q, w_k, w_v, w_text_q, w_text_k, w_text_v, w_out, w_text_out, w_up, w_down,
         w_text_up, w_text_down, w_norm_q, w_norm_k, w_text_norm_q, w_text_norm_k) = weights
        lora = self.matrices(lora)
        shift, scale, gate, shift_2, scale_2, gate_2 = network.chunks(self.modulate(emb, w_modulate, lora), 6)
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = network.chunks(
            self.text_modulate(emb, w_text_modulate, lora), 6)
        (image, x), (text, y) = network.shared(image, 2), network.shared(text, 2)
        x_q, x_k, x_v = network.shared(network.layer_norm_modulate(x, scale, shift, EPS), 3)
        y_q, y_k, y_v = network.shared(network.layer_norm_modulate(y, text_scale, text_shift, EPS), 3)
        q = network.norm_rotate_joint(
            by_head(self.text_q(y_q, w_text_q, lora), self.heads), by_head(self.to_q(x_q, w_q, lora), self.heads),
            w_text_norm_q[0], w_norm_q[0], cos, sin, self.norm_eps)
        k = network.norm_rotate_joint(
            by_head(self.text_k(y_k, w_text_k, lora), self.heads), by_head(self.to_k(x_k, w_k, lora), self.heads),
            w_text_norm_k[0], w_norm_k[0], cos, sin, self.norm_eps)
        v = network.join(by_head(self.text_v(y_v, w_text_v, lora), self.heads),
                         by_head(self.to_v(x_v, w_v, lora), self.heads))
        y, x = network.part(self.attend(q, k, v), text.shape[1])
        image, x = network.shared(network.gate_add(image, gate, self.to_out(x, w_out, lora)), 2)
        text, y = network.shared(network.gate_add(text, text_gate, self.text_out(y, w_text_out, lora)), 2)
        x = self.up(network.layer_norm_modulate(x, scale_2, shift_2, EPS), w_up, lora)
        y = self.text_up(network.layer_norm_modulate(y, text_scale_2, text_shift_2, EPS), w_text_up, lora)
        image = network.gate_add(image, gate_2, self.down(network.gelu_tanh(x), w_down, lora))
        text = network.gate_add(text, text_gate_2, self.text_down(network.gelu_tanh(y), w_text_down, lora))
        if self.is_float16:
            text = text.clamp(-65504, 65504)
        return text, image


class SingleBlock(nn.Cell):
    """Text and image as one stream: attention and feed-forward side by side."""

    NAMES = ("norm.linear", "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v", "proj_out", "attn.norm_q", "attn.norm_k")

    def __init__(self, layers: list[nn.Cell], heads: int, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        (self.modulate, self.up, self.to_q, self.to_k, self.to_v, self.out, norm, _, self.matrices) = layers
        self.heads, self.attend, self.is_float16 = heads, network.attention(dtype), dtype == ms.float16
        self.norm_eps = norm.eps

    def construct(self, x, emb, cos, sin, weights, lora):
        """x [B, S, D], emb [B, D], cos and sin of `network.positions` -> [B, S, D]."""
        w_modulate, w_up, w_q, w_k, w_v, w_out, w_norm_q, w_norm_k = weights
        lora = self.matrices(lora)
        shift, scale, gate = network.chunks(self.modulate(emb, w_modulate, lora), 3)
        x, y = network.shared(x, 2)
        y, y_q, y_k, y_v = network.shared(network.layer_norm_modulate(y, scale, shift, EPS), 4)
        q, k = by_head(self.to_q(y_q, w_q, lora), self.heads), by_head(self.to_k(y_k, w_k, lora), self.heads)
        q = network.norm_rotate(q, w_norm_q[0], cos, sin, self.norm_eps)
        k = network.norm_rotate(k, w_norm_k[0], cos, sin, self.norm_eps)
        attended = self.attend(q, k, by_head(self.to_v(y_v, w_v, lora), self.heads))
        hidden = network.gelu_tanh(self.up(y, w_up, lora))
        x = network.gate_add(x, gate, self.out(network.join_last(attended, hidden), w_out, lora))
        if self.is_float16:
            x = x.clamp(-65504, 65504)
        return x


class FluxBlock(mindone.FluxTransformerBlock):
    """The weights of a double block."""

    is_arranged = True


class FluxSingleBlock(mindone.FluxSingleTransformerBlock):
    """The weights of a single block."""

    is_arranged = True


class FluxNetwork(Arranged):
    """What FLUX.1's transformer and its ControlNet share: blocks, and what all blocks are given."""

    def conditions(self, timestep, guidance, pooled_projections, ids, dtype):
        """timestep (sigma) and guidance float32 [B] (None: told none), pooled_projections [B, P], ids float32
        [1 or B, S, 3] -> SiLU of what modulates the tokens [B, D], cosines and sines of `network.positions`."""
        embedders = self.time_text_embed
        temb = self.embed(embedders.timestep_embedder, timestep, dtype)
        if guidance is not None:
            temb = temb + self.embed(embedders.guidance_embedder, guidance, dtype)
        temb = temb + embedders.text_embedder(pooled_projections)
        angles = mint.matmul(ids.astype(ms.float32), frequencies(self.pos_embed.axes_dim, self.pos_embed.theta))
        batch = pooled_projections.shape[0]
        return (mint.nn.functional.silu(temb), network.positions(mint.cos(angles), batch, self.heads, dtype),
                network.positions(mint.sin(angles), batch, self.heads, dtype))

    def embed(self, embedder, number, dtype):
        """A number of [0, 1], or a guidance scale, as a vector [B, D]: sinusoids in float32 of a thousand times it."""
        return embedder(self.time_text_embed.time_proj(number.astype(ms.float32) * 1000).astype(dtype))

    def kinds(self):
        return {"double": Kind("transformer_blocks", DoubleBlock.NAMES, partial(self._build, DoubleBlock)),
                "single": Kind("single_transformer_blocks", SingleBlock.NAMES, partial(self._build, SingleBlock))}

    def _build(self, kind, _, layers):
        # a bias, because the weight may be stored in 8 bits
        return kind(layers, self.heads, self.x_embedder.bias.dtype)


class FluxTransformer(FluxNetwork, mindone.FluxTransformer2DModel):
    """Velocity of packed latents."""

    def construct(self, hidden_states, encoder_hidden_states=None, pooled_projections=None, timestep=None,
                  img_ids=None, txt_ids=None, guidance=None, return_dict=False, controlnet_block_samples=None,
                  controlnet_single_block_samples=None):
        """hidden_states [B, N, C], encoder_hidden_states [B, L, D'], pooled_projections [B, P], timestep (sigma) and
        guidance float32 [B], img_ids [N, 3], or [B, N, 3] of references that differ, txt_ids [L, 3], samples of
        `controlnet.FluxControlNet` -> a tuple of the velocity [B, N, C]. The arguments are mindone's."""
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        if img_ids.ndim == 2:
            img_ids = img_ids.expand_dims(0)
        txt_ids = ops.broadcast_to(txt_ids.expand_dims(0), (img_ids.shape[0], txt_ids.shape[0], txt_ids.shape[1]))
        emb, cos, sin = self.conditions(timestep, guidance, pooled_projections, mint.cat((txt_ids, img_ids), dim=1),
                                        image.dtype)
        lora = self.lora(image) if self.has_lora else self.no_lora
        cells, cell_of = self.double_cells, self.double_cell_of
        weights, places = self.double_weights, self.double_lora
        for i in range(len(cell_of)):
            text, image = cells[cell_of[i]]((text, image, emb, cos, sin), weights[i], lora[places[i]])
            image = control.with_sample(image, controlnet_block_samples, i, len(cell_of))
        x, text_tokens = network.join(text, image), text.shape[1]
        cells, cell_of = self.single_cells, self.single_cell_of
        weights, places = self.single_weights, self.single_lora
        for i in range(len(cell_of)):
            x = cells[cell_of[i]]((x, emb, cos, sin), weights[i], lora[places[i]])
            if controlnet_single_block_samples is not None and len(controlnet_single_block_samples) > 0:
                text, image = network.part(x, text_tokens)
                image = control.with_sample(image, controlnet_single_block_samples, i, len(cell_of))
                x = network.join(text, image)
        image = network.part(x, text_tokens)[1]
        scale, shift = network.chunks(self.norm_out.linear(emb), 2)
        return (self.proj_out(network.layer_norm_modulate(image, scale, shift, EPS)),)


def use_own_blocks(dit: nn.Cell, network_class: type[FluxNetwork] = FluxTransformer) -> nn.Cell:
    """Make ``dit``, a FluxTransformer2DModel, compute by the blocks of this module, and return it. Of mindone's network
    of another class ``network_class`` is the subclass that does.

    Its parameters and their names stay, and its call as far as FLUX.1 itself goes: no IP adapter. Call
    it before the network is compiled; a second call does nothing.

    Raises: TypeError for an attention that is not FLUX.1's own: another processor, fused projections, dropout.
    """
    for block in (*dit.transformer_blocks, *dit.single_transformer_blocks):
        attn = block.attn
        if type(attn.processor) is not mindone.FluxAttnProcessor or attn.fused_projections or attn.dropout:
            raise TypeError(f"{type(attn.processor).__name__}, fused_projections={attn.fused_projections}, dropout="
                            f"{attn.dropout}: expected a FluxAttnProcessor without either. Take the network as it is "
                            "loaded.")
    dit.__class__, dit.heads = network_class, dit.config.num_attention_heads
    for block in dit.transformer_blocks:
        block.__class__ = FluxBlock
    for block in dit.single_transformer_blocks:
        block.__class__ = FluxSingleBlock
    dit.take_lora()
    return dit


def build_transformer(config: dict) -> FluxTransformer:
    """The network of a ``config.json``, its weights still to come.

    Raises: WeightError for a setting that cannot be meant.
    """
    given = arguments(mindone.FluxTransformer2DModel, config)
    check_axes(given)
    return use_own_blocks(mindone.FluxTransformer2DModel(**given))
