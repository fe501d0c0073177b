"""mindone's blocks of image networks (UNets and VAEs), with the native kernels that join two of their operations.

A residual block normalises and activates in one pass; attention takes the heads as they lie. What a kernel does not
cover (masks, other activations, other dtypes) goes the way of mindone's own method, which is handed in.
"""
from __future__ import annotations

from collections.abc import Callable

from mindspore import mint

from ms_diffsynth.ops.cpu.functional import are_float32
from ms_diffsynth.ops.cpu.native import kernels


def _norm_silu(norm, x):
    return kernels.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def resnet_block(original: Callable) -> Callable:
    """``ResnetBlock2D.construct``: input_tensor [B, C, H, W], temb [B, D] or None -> [B, C', H', W']."""

    def construct(self, input_tensor, temb):
        if self.time_embedding_norm != "default" or not isinstance(self.nonlinearity, mint.nn.SiLU) \
                or not are_float32(input_tensor, self.norm1.weight):
            return original(self, input_tensor, temb)
        hidden = _norm_silu(self.norm1, input_tensor)
        if self.upsample is not None:
            input_tensor, hidden = self.upsample(input_tensor), self.upsample(hidden)
        elif self.downsample is not None:
            input_tensor, hidden = self.downsample(input_tensor), self.downsample(hidden)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb).expand_dims(2).expand_dims(3)
        if temb is not None:
            hidden = hidden + temb
        hidden = self.conv2(self.dropout(_norm_silu(self.norm2, hidden)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        total = input_tensor + hidden
        return total if self.output_scale_factor == 1 else total / self.output_scale_factor

    return construct


def attention(original: Callable) -> Callable:
    """``AttnProcessor2_0.__call__``: hidden_states [B, C, H, W] or [B, S, D], encoder_hidden_states [B, S', D']."""

    def call(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if attention_mask is not None or attn.spatial_norm is not None or attn.norm_cross or attn.norm_q is not None \
                or attn.norm_k is not None or not are_float32(hidden_states, attn.to_q.weight):
            return original(self, attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        shape, tokens = hidden_states.shape, hidden_states
        if len(shape) == 4:
            if attn.group_norm is not None:
                tokens = attn.group_norm(tokens)
            tokens = tokens.reshape(shape[0], shape[1], -1).swapaxes(1, 2)
        elif attn.group_norm is not None:
            tokens = attn.group_norm(tokens.swapaxes(1, 2)).swapaxes(1, 2)
        others = tokens if encoder_hidden_states is None else encoder_hidden_states
        q = attn.to_q(tokens).reshape(tokens.shape[0], tokens.shape[1], attn.heads, -1)
        k = attn.to_k(others).reshape(others.shape[0], others.shape[1], attn.heads, -1)
        v = attn.to_v(others).reshape(others.shape[0], others.shape[1], attn.heads, -1)
        out = attn.to_out[1](attn.to_out[0](kernels.attention(q, k, v)))
        if len(shape) == 4:
            out = out.swapaxes(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    return call


METHODS = {"mindone.diffusers.models.resnet": {"ResnetBlock2D.construct": resnet_block},
           "mindone.diffusers.models.attention_processor": {"AttnProcessor2_0.__call__": attention}}
