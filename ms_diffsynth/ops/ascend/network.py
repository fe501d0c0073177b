"""The operations of `ops.network` on Ascend, by CANN's fused kernels: no transposition to [B, H, S, D] and few casts.

RmsNorm and FlashAttentionScore add up in float32 and return the dtype of x. RotaryPositionEmbedding (CANN 8.2 and
later) takes cos and sin in the dtype of x. Flash attention takes bfloat16 and float16 only.
"""
from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import Dense, GeluExt, LayerNormExt, RmsNorm, RotaryPositionEmbedding, SplitWithSize
from mindspore.ops.operations.nn_ops import FlashAttentionScore

_dense, _gelu, _layer_norm, _rotary = Dense(), GeluExt(), LayerNormExt(), RotaryPositionEmbedding()
_matmul = P.MatMul()
_join, _join_last, _split = P.Concat(1), P.Concat(-1), SplitWithSize()
_INTERLEAVED = 1  # pairs (x[2i], x[2i+1]), as FLUX and Qwen-Image rotate


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


def low_rank(x, down, up):
    rows = _matmul(_matmul(x.reshape(-1, x.shape[-1]), down), up)
    return rows.reshape((*x.shape[:-1], up.shape[1]))


def gelu_tanh(x):
    return _gelu(x, "tanh")


def layer_norm_modulate(x, scale, shift, eps):
    width = x.shape[-1]  # MindSpore 2.10 cannot compile the norm without weights
    normal = _layer_norm(x, (width,), _filled(width, 1, x.dtype), _filled(width, 0, x.dtype), eps)[0]
    return normal * (scale + 1).expand_dims(1) + shift.expand_dims(1)


def rms_norm(x, weight, eps):
    return RmsNorm(eps)(x, weight)[0]


def gate_add(residual, gate, x):
    return residual + gate.expand_dims(1) * x


def attend(q, k, v, cos, sin):
    tokens, heads, size = q.shape[1], q.shape[2], q.shape[3]
    cos = cos.astype(q.dtype).reshape(1, tokens, 1, size)
    sin = sin.astype(q.dtype).reshape(1, tokens, 1, size)
    q, k = _rotary(q, cos, sin, _INTERLEAVED), _rotary(k, cos, sin, _INTERLEAVED)
    attention = FlashAttentionScore(head_num=heads, scale_value=size ** -0.5, input_layout="BSND")
    return attention(q, k, v, None, None, None, None)[3].reshape(q.shape[0], tokens, heads * size)


def chunks(x, number):
    return _split(x, (x.shape[1] // number,) * number, 1)


def join(first, second):
    return _join((first, second))


def part(x, first_tokens):
    return _split(x, (first_tokens, x.shape[1] - first_tokens), 1)


def join_last(first, second):
    return _join_last((first, second))
