"""Building blocks of diffusion transformers with back-propagation of their own: what makes the CPU as fast as PyTorch.

The mathematics is that of the composed operations; only the kernels differ. The CPU's matrix product is fast and the
rest is not: for 295k float32 elements a product of equal shapes takes 0.15 to 0.3 ms, one that broadcasts 0.5 (2.1 when
others use the cores), an outer product 0.25, a sum by a product with ones 0.27, ReduceSum ten times that (MindSpore
2.10, 2 cores, 2026-11-21). So sums are matrix products with ones, a vector needed twice is spread over a matrix by an
outer product with ones (exact: one term each), pairs are swapped by a product with a signed permutation (exact), and
what backward needs is kept from forward.

A weight that is not trained costs no gradient in a compiled step, whose compiler drops it; PyNative computes it.

Each function takes and returns float32, equal in PyNative and compiled. There are no second derivatives.
"""
from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SigmoidGrad, SplitWithSize
from mindspore.ops.primitive import constexpr

from ms_diffsynth.ops.cpu import functional

_matmul, _matmul_tn, _matmul_nt = P.MatMul(), P.MatMul(transpose_a=True), P.MatMul(transpose_b=True)
_bias_add = P.BiasAdd()
_bmm, _bmm_tn, _bmm_nt = P.BatchMatMul(), P.BatchMatMul(transpose_a=True), P.BatchMatMul(transpose_b=True)
_softmax, _erf = P.Softmax(-1), P.Erf()
_sigmoid_grad, _split = SigmoidGrad(), SplitWithSize()

GELU_LINEAR = 2 * (2 / np.pi) ** 0.5  # x sigmoid(x (a + b x^2)) is the tanh form of GELU
GELU_CUBIC = 0.044715 * GELU_LINEAR
LEFT_OUT = 1e30  # taken from a score: its weight becomes exactly 0


@constexpr
def _ones(*shape: int) -> Tensor:
    """A constant: built once, when the graph is compiled."""
    return Tensor(np.ones(shape, np.float32))


@constexpr
def _pair_swap(size: int) -> Tensor:
    """R with (x R)[2i] = -x[2i+1] and (x R)[2i+1] = x[2i]."""
    matrix = np.zeros((size, size), np.float32)
    even = np.arange(0, size, 2)
    matrix[even + 1, even], matrix[even, even + 1] = -1, 1
    return Tensor(matrix)


@constexpr
def _mean_column(size: int) -> Tensor:
    return Tensor(np.full((size, 1), 1 / size, np.float32))


def _spread(rows, tokens):
    """Each sample's vector for each of its tokens: [B, D] -> [B, tokens, D]."""
    return _bmm(_ones(rows.shape[0], tokens, 1), rows.expand_dims(1))


def _sum_tokens(x):
    """[B, S, D] -> [B, D]."""
    return _bmm(_ones(x.shape[0], 1, x.shape[1]), x).reshape(x.shape[0], x.shape[2])


def _halves(x):
    return _split(x, (x.shape[-1] // 2, x.shape[-1] // 2), -1)


def _attention_gradients(q, k, v, out, dout):
    y, weights = out
    dy = dout[0]
    total = _bmm(dy * y, _ones(q.shape[0], q.shape[2], 1))  # of each row of weights * dweights
    # dy v^T - total, the subtraction as one more column of the product
    dweights = _bmm_nt(ops.cat((dy, total), -1), ops.cat((v, -_ones(v.shape[0], v.shape[1], 1)), -1))
    dscores = weights * dweights
    return _bmm(dscores, k), _bmm_tn(dscores, q), _bmm_tn(weights, dy)


class _Linear(nn.Cell):
    def construct(self, x, weight, bias):
        return _bias_add(_matmul_nt(x, weight), bias)  # Dense adds by broadcasting: half as fast

    def bprop(self, x, weight, bias, out, dout):
        dbias = _matmul(_ones(1, dout.shape[0]), dout).reshape(bias.shape)
        return _matmul(dout, weight), _matmul_tn(dout, x), dbias


class _GeluTanh(nn.Cell):
    def construct(self, x):
        inner = x * x * GELU_CUBIC + GELU_LINEAR
        gate = ops.sigmoid(x * inner)
        return x * gate, gate, inner

    def bprop(self, x, out, dout):
        _, gate, inner = out
        slope = inner * 3.0 - 2 * GELU_LINEAR  # a + 3 b x^2
        return dout[0] * (gate + _sigmoid_grad(gate, x * slope)),


class _SwiGLU(nn.Cell):
    def construct(self, x):
        first, second = _halves(x)
        gate = ops.sigmoid(first)
        return first * gate * second, gate

    def bprop(self, x, out, dout):
        first, second = _halves(x)
        gate, dy = out[1], dout[0]
        dsilu = dy * second
        return ops.cat((dsilu * gate + _sigmoid_grad(gate, dsilu * first), dy * first * gate), -1),


class _GEGLU(nn.Cell):
    def construct(self, x):
        first, second = _halves(x)
        share = (_erf(second * 0.5**0.5) + 1.0) * 0.5  # of a normal distribution
        return first * second * share, share

    def bprop(self, x, out, dout):
        first, second = _halves(x)
        share, dy = out[1], dout[0]
        density = ops.exp(second * second * -0.5) * (2 * np.pi) ** -0.5
        return ops.cat((dy * second * share, dy * first * (share + second * density)), -1),


class _GatedSiLU(nn.Cell):
    def construct(self, gate, x):
        sigmoid = ops.sigmoid(gate)
        silu = gate * sigmoid
        return silu * x, sigmoid, silu

    def bprop(self, gate, x, out, dout):
        _, sigmoid, silu = out
        dy = dout[0]
        dsilu = dy * x
        return dsilu * sigmoid + _sigmoid_grad(sigmoid, dsilu * gate), dy * silu


class _LayerNormModulate(nn.Cell):
    def construct(self, x, scale, shift, eps):
        size, tokens = x.shape[2], x.shape[1]
        normal, _, variance = P.LayerNorm(-1, -1, eps)(x, _ones(size), _ones(size) * 0.0)
        factor = scale + 1.0
        y = normal * _spread(factor, tokens) + _spread(shift, tokens)
        return y, normal, ops.rsqrt(variance + eps), factor

    def bprop(self, x, scale, shift, eps, out, dout):
        _, normal, rstd, factor = out
        batch, _, size = x.shape
        dy = dout[0]
        product = dy * normal
        column = factor.expand_dims(2) * (1.0 / size)
        mean = _bmm(dy, column) * rstd
        slope = _bmm(product, column) * rstd
        row = _ones(batch, 1, size)
        g = dy * _bmm(rstd, factor.expand_dims(1))
        dx = g - _bmm(mean, row) - normal * _bmm(slope, row)
        return dx, _sum_tokens(product), _sum_tokens(dy), 0.0


class _GateAdd(nn.Cell):
    def construct(self, residual, gate, x):
        spread = _spread(gate, x.shape[1])
        return residual + spread * x, spread

    def bprop(self, residual, gate, x, out, dout):
        dy = dout[0]
        return dy, _sum_tokens(dy * x), dy * out[1]


class _RMSNorm(nn.Cell):
    def construct(self, x, weight, eps):
        size = x.shape[-1]
        rows = x.reshape(-1, size)
        rstd = ops.rsqrt(_matmul(rows * rows, _mean_column(size)) + eps)
        factor = _matmul(rstd, weight.reshape(1, size))
        return (rows * factor).reshape(x.shape), rstd, factor

    def bprop(self, x, weight, eps, out, dout):
        _, rstd, factor = out
        size = x.shape[-1]
        rows, dy = x.reshape(-1, size), dout[0].reshape(-1, size)
        product = dy * rows
        dweight = _matmul_tn(rstd, product).reshape(weight.shape)
        slope = _matmul(product, weight.reshape(size, 1)) * (rstd * rstd * rstd) * (1.0 / size)
        dx = dy * factor - rows * _matmul(slope, _ones(1, size))
        return dx.reshape(x.shape), dweight, 0.0


class _Rotary(nn.Cell):
    def construct(self, x, cos, sin):
        swapped = _matmul(x.reshape(-1, x.shape[-1]), _pair_swap(x.shape[-1])).reshape(x.shape)
        return x * cos + swapped * sin

    def bprop(self, x, cos, sin, out, dout):
        size = x.shape[-1]
        # the transposed swap is its negative
        swapped = _matmul((dout * sin).reshape(-1, size), _pair_swap(size)).reshape(x.shape)
        return dout * cos - swapped, ops.zeros_like(cos), ops.zeros_like(sin)


class _Attention(nn.Cell):
    def construct(self, q, k, v):
        weights = _softmax(_bmm_nt(q, k))
        return _bmm(weights, v), weights

    def bprop(self, q, k, v, out, dout):
        return _attention_gradients(q, k, v, out, dout)


class _MaskedAttention(nn.Cell):
    def construct(self, q, k, v, added):
        # what is added to the scores of a key is one more channel of it
        weights = _softmax(_bmm_nt(ops.cat((q, _ones(q.shape[0], q.shape[1], 1)), -1), ops.cat((k, added), -1)))
        return _bmm(weights, v), weights

    def bprop(self, q, k, v, added, out, dout):
        return _attention_gradients(q, k, v, out, dout) + (ops.zeros_like(added),)


_linear, _gelu_tanh, _gate_add, _rotary, _attention = _Linear(), _GeluTanh(), _GateAdd(), _Rotary(), _Attention()
_swiglu, _geglu, _gated_silu, _masked_attention = _SwiGLU(), _GEGLU(), _GatedSiLU(), _MaskedAttention()
_layer_norm_modulate, _rms_norm = _LayerNormModulate(), _RMSNorm()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b.

    Shapes: x [..., in], weight [out, in], bias [out] -> [..., out].
    """
    return functional.linear(x, weight, bias) if bias is None else linear_with_bias(x, weight, bias)


def linear_with_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` without a condition, which a recomputed block cannot have (see `ops.network`)."""
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias).reshape((*x.shape[:-1], weight.shape[0]))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU, computed as x sigmoid(2 z). Shapes: any."""
    return _gelu_tanh(x)[0]


def gate_add(residual: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """residual + gate x. Shapes: residual and x [B, S, D], gate [B, D]."""
    return _gate_add(residual, gate, x)[0]


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) second half, halves of the last axis. Shapes: [..., 2 D] -> [..., D]."""
    return _swiglu(x)[0]


def geglu(x: Tensor) -> Tensor:
    """First half gelu(second half), halves of the last axis, with the exact GELU. Shapes: [..., 2 D] -> [..., D]."""
    return _geglu(x)[0]


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) x. Shapes: any, the same for both."""
    return _gated_silu(gate, x)[0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i+1]) of the last axis.

    Shapes: x [..., D] with any even D, cos and sin as x; they get a zero gradient: positions are constants.
    """
    return _rotary(x, cos, sin)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v without a mask; ``scale`` None means D^-1/2.

    Shapes: q [B, H, S, D], k and v [B, H, S', D] -> [B, H, S, D].
    """
    return scaled_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def scaled_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attention` without a condition, which a recomputed block cannot have (see `ops.network`)."""
    size = q.shape[-1]
    y = _attention(q.reshape(-1, q.shape[2], size) * scale, k.reshape(-1, k.shape[2], size),
                   v.reshape(-1, v.shape[2], size))[0]
    return y.reshape(q.shape)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale + added) v; what is added belongs to a key and gets a zero gradient.

    Shapes: q [B, H, S, D], k and v [B, H, S', D], added [B H, S', 1] -> [B, H, S, D].
    """
    size = q.shape[-1]
    y = _masked_attention(q.reshape(-1, q.shape[2], size) * scale, k.reshape(-1, k.shape[2], size),
                          v.reshape(-1, v.shape[2], size), added)[0]
    return y.reshape(q.shape)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then scaled and shifted: norm(x) (1 + scale) + shift.

    Shapes: x [B, S, D], scale and shift [B, D] -> [B, S, D].
    """
    return _layer_norm_modulate(x, scale, shift, eps)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(x) weight + bias. Shapes: x [B, S, D], weight and bias [D]."""
    rows = x.reshape(1, -1, x.shape[-1])
    return layer_norm_modulate(rows, (weight - 1).expand_dims(0), bias.expand_dims(0), eps).reshape(x.shape)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu of the group norm. Shapes: x [B, C, H, W], weight and bias [C]."""
    return functional.silu(functional.group_norm(x, groups, weight, bias, eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. Shapes: x [..., D], weight [D] -> [..., D]."""
    return _rms_norm(x, weight, eps)[0]



def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) (1 + scale). Shapes: x [B, S, D], weight [D], scale [B, D] -> as x."""
    return rms_norm(x, weight, eps) * _spread(scale + 1.0, x.shape[1])
