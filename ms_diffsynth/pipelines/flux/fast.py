"""FLUX.1's transformer on the fast CPU cells, one network at a time: mindone's classes stay as they are.

A module is given a subclass of its own class with another ``construct``, so that its parameters, their names and its
place in the network do not change, and a LoRA can be put on it before or after.
"""
from __future__ import annotations

import logging
from collections.abc import Callable

import mindspore as ms
from mindspore import mint, nn

from ms_diffsynth.ops import install_cpu_kernels
from ms_diffsynth.ops.cpu import fast

install_cpu_kernels()  # a network of mindone is adapted while it is imported

from mindone.diffusers.models import activations, layers_compat, normalization  # noqa: E402
from mindone.diffusers.models.transformers import transformer_flux as flux  # noqa: E402

logger = logging.getLogger(__name__)

# mindone's own, for the calls that the fast forms do not cover
_attention = flux.FluxAttnProcessor.__call__
_double_block = flux.FluxTransformerBlock.construct
_single_block = flux.FluxSingleTransformerBlock.construct


class FastLinear(mint.nn.Linear):
    def construct(self, input):
        return fast.linear(input, self.weight, self.bias)


class FastRMSNorm(normalization.RMSNorm):
    def construct(self, hidden_states):
        return fast.rms_norm(hidden_states, self.weight, self.eps)


class FastGELU(activations.GELU):
    def construct(self, hidden_states):
        return fast.gelu_tanh(self.proj(hidden_states))


class FastActivation(layers_compat.GELU):
    def construct(self, input):
        return fast.gelu_tanh(input)


class FastAdaLayerNormZero(normalization.AdaLayerNormZero):
    def construct(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mint.chunk(self.linear(self.silu(emb)), 6, dim=1)
        return fast.layer_norm_modulate(x, scale, shift, self.norm.eps), gate, shift_mlp, scale_mlp, gate_mlp


class FastAdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    def construct(self, x, emb=None):
        shift, scale, gate = mint.chunk(self.linear(self.silu(emb)), 3, dim=1)
        return fast.layer_norm_modulate(x, scale, shift, self.norm.eps), gate


class FastAdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    def construct(self, x, conditioning_embedding):
        scale, shift = mint.chunk(self.linear(self.silu(conditioning_embedding)), 2, dim=1)
        return fast.layer_norm_modulate(x, scale, shift, self.norm.eps)


class FastTransformerBlock(flux.FluxTransformerBlock):
    def construct(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        if joint_attention_kwargs:
            return _double_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
                                 joint_attention_kwargs)
        image, text = hidden_states, encoder_hidden_states
        normed, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(image, emb=temb)
        text_normed, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = self.norm1_context(text, emb=temb)
        attended, text_attended = self.attn(hidden_states=normed, encoder_hidden_states=text_normed,
                                            image_rotary_emb=image_rotary_emb)
        image = fast.gate_add(image, gate, attended)
        normed = fast.layer_norm_modulate(image, scale_mlp, shift_mlp, self.norm2.eps)
        image = fast.gate_add(image, gate_mlp, self.ff(normed))
        text = fast.gate_add(text, text_gate, text_attended)
        text_normed = fast.layer_norm_modulate(text, text_scale_mlp, text_shift_mlp, self.norm2_context.eps)
        text = fast.gate_add(text, text_gate_mlp, self.ff_context(text_normed))
        return text, image


class FastSingleTransformerBlock(flux.FluxSingleTransformerBlock):
    def construct(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        if joint_attention_kwargs:
            return _single_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
                                 joint_attention_kwargs)
        text_tokens = encoder_hidden_states.shape[1]
        x = mint.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(x, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        x = fast.gate_add(x, gate, self.proj_out(mint.cat([attended, mlp], dim=2)))
        return x[:, :text_tokens], x[:, text_tokens:]


class FastAttnProcessor(flux.FluxAttnProcessor):
    """Joint attention without a mask; every other call goes to mindone's processor."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if (attention_mask is not None or attn.fused_projections or not isinstance(image_rotary_emb, tuple)
                or self._attention_backend is not None or self._parallel_config is not None):
            return _attention(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        heads = attn.heads
        q = attn.norm_q(_to_heads(attn.to_q(hidden_states), heads))
        k = attn.norm_k(_to_heads(attn.to_k(hidden_states), heads))
        v = _to_heads(attn.to_v(hidden_states), heads)
        if encoder_hidden_states is not None:
            text_q = attn.norm_added_q(_to_heads(attn.add_q_proj(encoder_hidden_states), heads))
            text_k = attn.norm_added_k(_to_heads(attn.add_k_proj(encoder_hidden_states), heads))
            text_v = _to_heads(attn.add_v_proj(encoder_hidden_states), heads)
            q, k, v = mint.cat([text_q, q], dim=1), mint.cat([text_k, k], dim=1), mint.cat([text_v, v], dim=1)
        cos, sin = image_rotary_emb
        q, k = fast.rotary(q.swapaxes(1, 2), cos, sin), fast.rotary(k.swapaxes(1, 2), cos, sin)
        out = fast.attention(q, k, v.swapaxes(1, 2)).swapaxes(1, 2)
        out = out.reshape(out.shape[0], out.shape[1], -1)
        if encoder_hidden_states is None:
            return out
        text_tokens = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, text_tokens:])), attn.to_add_out(out[:, :text_tokens])


def _to_heads(x, heads):
    """[B, S, H D] -> [B, S, H, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1)


def _is_plain(norm: nn.Cell) -> bool:
    """A LayerNorm over the last axis without weights of its own."""
    return (type(norm) in (mint.nn.LayerNorm, normalization.LayerNorm) and norm.weight is None and norm.bias is None)


Guard = Callable[[nn.Cell], bool]
# class of mindone -> its fast form, and the condition under which both compute the same
REPLACEMENTS: dict[type[nn.Cell], tuple[type[nn.Cell], Guard]] = {
    mint.nn.Linear: (FastLinear, lambda cell: cell.bias is not None),
    normalization.RMSNorm: (FastRMSNorm, lambda cell: cell.weight is not None and cell.bias is None
                            and cell.weight.ndim == 1),
    activations.GELU: (FastGELU, lambda cell: cell.approximate == "tanh"),
    layers_compat.GELU: (FastActivation, lambda cell: cell.approximate == "tanh"),
    normalization.AdaLayerNormZero: (FastAdaLayerNormZero, lambda cell: cell.emb is None and _is_plain(cell.norm)),
    normalization.AdaLayerNormZeroSingle: (FastAdaLayerNormZeroSingle, lambda cell: _is_plain(cell.norm)),
    normalization.AdaLayerNormContinuous: (FastAdaLayerNormContinuous, lambda cell: _is_plain(cell.norm)),
    flux.FluxTransformerBlock: (FastTransformerBlock,
                                lambda cell: _is_plain(cell.norm2) and _is_plain(cell.norm2_context)),
    flux.FluxSingleTransformerBlock: (FastSingleTransformerBlock, lambda cell: True),
}


def use_fast_cells(dit: nn.Cell) -> nn.Cell:
    """Put the fast cells into ``dit``, a FluxTransformer2DModel, and return it; parameters and their names stay.

    Only on the CPU and when every parameter is float32; a module whose settings the fast form does not cover stays
    mindone's. Call it before the network is compiled; a second call does nothing.
    """
    if ms.get_context("device_target") != "CPU" or any(p.dtype != ms.float32 for p in dit.get_parameters()):
        return dit
    replaced = 0
    for _, cell in dit.cells_and_names():
        fast_class, is_same = REPLACEMENTS.get(type(cell), (None, None))
        if fast_class is not None and is_same(cell):
            cell.__class__ = fast_class
            replaced += 1
        if isinstance(cell, flux.FluxAttention) and type(cell.processor) is flux.FluxAttnProcessor:
            cell.set_processor(FastAttnProcessor())
            replaced += 1
    logger.debug("%s: %d modules use the fast CPU cells", type(dit).__name__, replaced)
    return dit
