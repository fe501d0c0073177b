"""The operations of `ops.network` on the CPU: those of `fast`, in float32."""
from __future__ import annotations

from mindspore import ops
from mindspore.ops import operations as P

from ms_diffsynth.ops.cpu import fast
from ms_diffsynth.ops.cpu.attention import scaled_dot_product_attention
from ms_diffsynth.ops.cpu.fast import (
    gate_add,
    gated_silu,
    geglu,
    gelu_tanh,
    group_norm_silu,
    layer_norm,
    layer_norm_modulate,
    rms_norm,
    rms_norm_modulate,
    rotary as rotate,
    swiglu,
)
from ms_diffsynth.ops.split import Split

__all__ = ["add_low_rank", "attention", "attention_where", "chunks", "gate_add", "gated_silu", "geglu", "gelu_tanh",
           "group_norm_silu", "join", "join_last", "layer_norm", "layer_norm_modulate", "linear", "linear_without_bias",
           "low_rank_each", "masked_attention", "norm_rotate", "norm_rotate_joint", "part", "parts", "positions",
           "rms_norm", "rms_norm_modulate", "rotate", "shared", "swiglu", "text_mask"]

_matmul, _matmul_nt = P.MatMul(), P.MatMul(transpose_b=True)
_bmm_nt = P.BatchMatMul(transpose_b=True)
_join, _join_last, _split, _split_last = P.Concat(1), P.Concat(-1), Split(1), Split(-1)


def linear(x, weight, bias):
    return fast.linear_with_bias(x, weight, bias)


def linear_without_bias(x, weight):
    return _matmul_nt(x.reshape(-1, x.shape[-1]), weight).reshape((*x.shape[:-1], weight.shape[0]))


def add_low_rank(y, x, down, up):
    rows = _matmul(_matmul(x.reshape(-1, x.shape[-1]), down), up)
    return y + rows.reshape(y.shape)


def shared(x, number):
    return (x,) * number


def low_rank_each(x, a, b):
    return _bmm_nt(_bmm_nt(x, a), b)


def positions(table, batch, heads, dtype):
    """float32 [B, S, H, D], so that no block has to broadcast."""
    return ops.broadcast_to(table.expand_dims(2), (batch, table.shape[1], heads, table.shape[2]))


def attention(dtype):
    return _attend


def masked_attention(dtype):
    return _attend_masked


def _attend(q, k, v):
    out = fast.scaled_attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), q.shape[3] ** -0.5)
    return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[1], -1)


def _attend_masked(q, k, v, mask):
    out = fast.masked_attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), mask, q.shape[3] ** -0.5)
    return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[1], -1)


def attention_where(dtype):
    return _attention_where


def _attention_where(q, k, v, looks):
    return scaled_dot_product_attention(q, k, v, looks > 0.5)


def text_mask(keys, queries, heads, dtype):
    """What is added to the scores of a key, for every head: [B H, S', 1]."""
    added = ((keys - 1) * fast.LEFT_OUT).expand_dims(1)
    return ops.broadcast_to(added, (keys.shape[0], heads, keys.shape[1])).reshape(-1, keys.shape[1], 1)


def chunks(x, number):
    return ops.Split(1, number)(x)


def join(first, second):
    return _join((first, second))


def part(x, first_tokens):
    return _split(x, (first_tokens, x.shape[1] - first_tokens))


def norm_rotate(x, weight, cos, sin, eps):
    return rotate(rms_norm(x, weight, eps), cos, sin)


def norm_rotate_joint(first, second, first_weight, second_weight, cos, sin, eps):
    return rotate(join(rms_norm(first, first_weight, eps), rms_norm(second, second_weight, eps)), cos, sin)


def join_last(first, second):
    return _join_last((first, second))


def parts(x, sizes):
    return _split_last(x, sizes)
