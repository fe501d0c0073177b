"""The operations of `ops.network` on the CPU: those of `fast`, in float32."""
from __future__ import annotations

from mindspore import ops
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SplitWithSize

from ms_diffsynth.ops.cpu import fast
from ms_diffsynth.ops.cpu.fast import gate_add, gelu_tanh, layer_norm_modulate, rms_norm

__all__ = ["attend", "chunks", "gate_add", "gelu_tanh", "join", "join_last", "layer_norm_modulate", "linear",
           "linear_without_bias", "low_rank", "part", "rms_norm", "shared"]

_matmul, _matmul_nt = P.MatMul(), P.MatMul(transpose_b=True)
_join, _join_last, _split = P.Concat(1), P.Concat(-1), SplitWithSize()


def linear(x, weight, bias):
    return fast.linear_with_bias(x, weight, bias)


def linear_without_bias(x, weight):
    return _matmul_nt(x.reshape(-1, x.shape[-1]), weight).reshape((*x.shape[:-1], weight.shape[0]))


def low_rank(x, down, up):
    rows = _matmul(_matmul(x.reshape(-1, x.shape[-1]), down), up)
    return rows.reshape((*x.shape[:-1], up.shape[1]))


def shared(x, number):
    return (x,) * number


def attend(q, k, v, cos, sin):
    scale = q.shape[3] ** -0.5
    q, k = fast.rotary(q.swapaxes(1, 2), cos, sin), fast.rotary(k.swapaxes(1, 2), cos, sin)
    out = fast.scaled_attention(q, k, v.swapaxes(1, 2), scale).swapaxes(1, 2)
    return out.reshape(out.shape[0], out.shape[1], -1)


def chunks(x, number):
    return ops.Split(1, number)(x)


def join(first, second):
    return _join((first, second))


def part(x, first_tokens):
    return _split(x, (first_tokens, x.shape[1] - first_tokens), 1)


def join_last(first, second):
    return _join_last((first, second))
