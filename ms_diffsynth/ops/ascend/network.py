"""The operations of `ops.network` on Ascend, by CANN's fused kernels: no transposition to [B, H, S, D] and few casts.

RmsNorm and FlashAttentionScore add up in float32 and return the dtype of x. RotaryPositionEmbedding (CANN 8.2 and
later) takes cos and sin in the dtype of x. Flash attention takes bfloat16 and float16 only, by MindSpore's documents,
and its mask, True for what is left out, has a row for every query: [B, 1, S, S'] is the smallest for keys that differ
between samples. Float32 attends by two products and a soft-max, with a mask of [B, 1, 1, S'] that is added.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import (
    Dense,
    GeluExt,
    LayerNormExt,
    RmsNorm,
    RotaryPositionEmbedding,
    SiLU,
    Swiglu,
)
from mindspore.ops.operations.nn_ops import FlashAttentionScore

from ms_diffsynth.ops.split import Split

_dense, _gelu, _layer_norm, _rotary = Dense(), GeluExt(), LayerNormExt(), RotaryPositionEmbedding()
_matmul = P.MatMul()
_silu, _swiglu, _softmax = SiLU(), Swiglu(), P.Softmax(-1)
_bmm, _bmm_nt = P.BatchMatMul(), P.BatchMatMul(transpose_b=True)
_join, _join_last, _split, _split_last = P.Concat(1), P.Concat(-1), Split(1), Split(-1)
_INTERLEAVED = 1  # pairs (x[2i], x[2i+1]), as FLUX and Qwen-Image rotate
LEFT_OUT = -1e30  # added to a score: its weight becomes exactly 0


@ops.constexpr
def _filled(length, value, dtype):
    return Tensor(np.full(length, value, np.float32), dtype)


class _Shared(nn.Cell):
    """``shared``: MindSpore would add up the gradients by AddN, of which there is only the old aclop kernel."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def construct(self, x):
        return (x,) * self.number

    def bprop(self, x, out, dout):
        total = dout[0]
        for k in range(1, self.number):
            total = total + dout[k]
        return (total,)


_shared = {number: _Shared(number) for number in (2, 3, 4)}


def shared(x, number):
    return _shared[number](x)


def linear(x, weight, bias):
    return _dense(x, weight, bias)


def linear_without_bias(x, weight):
    return _dense(x, weight, None)


def add_low_rank(y, x, down, up):
    rows = _matmul(_matmul(x.reshape(-1, x.shape[-1]), down), up)
    return y + rows.reshape((*x.shape[:-1], up.shape[1]))


def gelu_tanh(x):
    return _gelu(x, "tanh")


def layer_norm_modulate(x, scale, shift, eps):
    width = x.shape[-1]  # MindSpore 2.10 cannot compile the norm without weights
    normal = _layer_norm(x, (width,), _filled(width, 1, x.dtype), _filled(width, 0, x.dtype), eps)[0]
    return normal * (scale + 1).expand_dims(1) + shift.expand_dims(1)


def layer_norm(x, weight, bias, eps):
    return _layer_norm(x, (x.shape[-1],), weight.astype(x.dtype), bias.astype(x.dtype), eps)[0]


def group_norm_silu(x, groups, weight, bias, eps):
    return _silu(mint.nn.functional.group_norm(x, groups, weight, bias, eps))


def rms_norm(x, weight, eps):
    return RmsNorm(eps)(x, weight)[0]


def rms_norm_modulate(x, weight, scale, eps):
    return rms_norm(x, weight, eps) * (scale + 1).expand_dims(1)


def gate_add(residual, gate, x):
    return residual + gate.expand_dims(1) * x


def low_rank_each(x, a, b):
    return _bmm_nt(_bmm_nt(x, a), b)


def swiglu(x):
    return _swiglu(x, -1)


def geglu(x):
    first, second = _split_last(x, (x.shape[-1] // 2, x.shape[-1] // 2))
    return first * _gelu(second, "none")


def gated_silu(gate, x):
    return _silu(gate) * x


def positions(table, batch, heads, dtype):
    return table.astype(dtype).expand_dims(2)


def rotate(x, cos, sin):
    return _rotary(x, cos, sin, _INTERLEAVED)


def attention(dtype):
    return _exact if dtype == ms.float32 else _flash


def masked_attention(dtype):
    return _exact_masked if dtype == ms.float32 else _flash_masked


def attention_where(dtype):
    return _exact_where if dtype == ms.float32 else _flash_where


def text_mask(keys, queries, heads, dtype):
    left_out, (batch, length) = 1 - keys, keys.shape
    if dtype == ms.float32:
        return (left_out * LEFT_OUT).reshape(batch, 1, 1, length)
    return ops.broadcast_to(left_out.astype(ms.uint8).reshape(batch, 1, 1, length), (batch, 1, queries, length))


def _flash(q, k, v):
    return _flash_masked(q, k, v, None)


def _flash_masked(q, k, v, mask):
    attention = FlashAttentionScore(head_num=q.shape[2], scale_value=q.shape[3] ** -0.5, input_layout="BSND")
    return attention(q, k, v, None, None, None, mask)[3].reshape(q.shape[0], q.shape[1], -1)


def _exact(q, k, v):
    return _weighted(_softmax(_scores(q, k)), v)


def _exact_masked(q, k, v, mask):
    return _weighted(_softmax(_scores(q, k) + mask), v)


def _flash_where(q, k, v, looks):
    left_out = ops.broadcast_to((1 - looks).astype(ms.uint8), (q.shape[0], 1, q.shape[2], k.shape[2]))
    attention = FlashAttentionScore(head_num=q.shape[1], scale_value=q.shape[3] ** -0.5, input_layout="BNSD")
    return attention(q, k, v, None, None, None, left_out)[3]


def _exact_where(q, k, v, looks):
    return _bmm(_softmax(_bmm_nt(q * q.shape[3] ** -0.5, k) + (1 - looks) * LEFT_OUT), v)


def _scores(q, k):
    return _bmm_nt(q.swapaxes(1, 2) * q.shape[3] ** -0.5, k.swapaxes(1, 2))


def _weighted(weights, v):
    return _bmm(weights, v.swapaxes(1, 2)).swapaxes(1, 2).reshape(v.shape[0], weights.shape[2], -1)


def chunks(x, number):
    return _split(x, (x.shape[1] // number,) * number)


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
