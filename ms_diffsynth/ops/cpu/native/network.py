"""The operations of `ops.network` on the CPU, by native kernels where they have one."""
from __future__ import annotations

from ms_diffsynth.ops.cpu import fast
from ms_diffsynth.ops.cpu.native import kernels
from ms_diffsynth.ops.cpu.native.kernels import (
    add_low_rank,
    gate_add,
    gated_silu,
    geglu,
    gelu_tanh,
    group_norm_silu,
    layer_norm,
    layer_norm_modulate,
    linear,
    linear_without_bias,
    norm_rotate,
    norm_rotate_joint,
    rms_norm,
    rms_norm_modulate,
    rotate,
    swiglu,
)
from ms_diffsynth.ops.cpu.network import attention_where, chunks, join, join_last, low_rank_each, part, parts, shared

__all__ = ["add_low_rank", "attention", "attention_where", "chunks", "gate_add", "gated_silu", "geglu", "gelu_tanh",
           "group_norm_silu", "join", "join_last", "layer_norm", "layer_norm_modulate", "linear", "linear_without_bias",
           "low_rank_each", "masked_attention", "norm_rotate", "norm_rotate_joint", "part", "parts", "positions",
           "rms_norm", "rms_norm_modulate", "rotate", "shared", "swiglu", "text_mask"]


def positions(table, batch, heads, dtype):
    """As they are, [1 or B, S, D]: the kernel finds the row of a token."""
    return table


def attention(dtype):
    return kernels.attention


def masked_attention(dtype):
    return kernels.masked_attention


def text_mask(keys, queries, heads, dtype):
    """What is added to the scores of a key: [B, S']."""
    return (keys - 1) * fast.LEFT_OUT
