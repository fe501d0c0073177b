"""The native kernels as MindSpore's operators, each with its shapes and its gradient.

Imported only where `build.library` gives a library. Every function takes and returns float32, equal in PyNative and
compiled; a kernel refuses other dtypes, and only linear layers and low-rank products cast them. A gradient is the
``bprop`` of a cell; numbers travel as small Tensors, because an operator's attributes would need a library per value.
There are no second derivatives. None of these functions has a condition, which a recomputed block cannot have (see
`ops.network`).
"""
from __future__ import annotations

from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common._grad_function import _Function
from mindspore.ops import operations as P, signature as sig
from mindspore.ops.primitive import constexpr

from ms_diffsynth.ops.cpu.native.build import has_convolutions, library

HAS_CONVOLUTIONS = has_convolutions()
_zeros_like = P.ZerosLike()


def _kernel(name: str, shapes, outputs: int = 1) -> ops.Custom:
    """A kernel of the library as an operator; ``shapes`` gives the shapes of its outputs from those of its inputs."""
    return ops.Custom(f"{library()}:{name}", shapes, ms.float32 if outputs == 1 else (ms.float32,) * outputs, "aot")


@cache
def _made(values: tuple[float, ...]) -> Tensor:
    return Tensor(np.array(values, np.float32))


@constexpr
def _numbers(*values: float) -> Tensor:
    """What a kernel takes as numbers: [len(values)]."""
    return _made(values)


@cache
def _empty(shape: tuple[int, ...]) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


@constexpr
def _zeros(*shape: int) -> Tensor:
    return _empty(shape)


def _first(x, *_):
    return x


def _second(x, y, *_):
    return y


# ---- linear maps ----

_linear_forward = _kernel("linear_forward", lambda x, w, *_: (*x[:-1], w[0]))
_linear_x = _kernel("linear_backward_x", lambda dy, w: (*dy[:-1], w[1]))
_linear_w = _kernel("linear_backward_w", lambda dy, x: (dy[-1], x[-1]))
_linear_b = _kernel("linear_backward_b", lambda dy: (dy[-1],))


_low_rank_forward = _kernel("low_rank_forward", lambda y, x, down, up: (y, (*x[:-1], down[1])), 2)
_low_rank_backward = _kernel("low_rank_backward", lambda dy, x, low, down, up: (x, down, up), 3)


class _EagerLinear(_Function):
    """What PyNative differentiates: unlike a cell's ``bprop`` it knows which gradients are wanted."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, weights[0])
        return _linear_forward(x, *weights)

    @staticmethod
    def backward(ctx, dy):
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        gradients = (_linear_x(dy, weight) if wanted[0] else None, _linear_w(dy, x) if wanted[1] else None)
        return gradients if len(wanted) == 2 else (*gradients, _linear_b(dy) if wanted[2] else None)


def _eager_linear(x, *weights):
    if all(tensor.dtype == ms.float32 for tensor in (x, *weights)):
        return _EagerLinear.apply(x, *weights)
    return _EagerLinear.apply(*[tensor.astype(ms.float32) for tensor in (x, *weights)]).astype(x.dtype)


class _Linear(nn.Cell):
    def construct(self, x, weight, bias):
        return _linear_forward(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return _linear_x(dout, weight), _linear_w(dout, x), _linear_b(dout)


class _LinearWithoutBias(nn.Cell):
    def construct(self, x, weight):
        return _linear_forward(x, weight)

    def bprop(self, x, weight, out, dout):
        return _linear_x(dout, weight), _linear_w(dout, x)


class _AnyLinear(nn.Cell):
    """In float32, whatever the layer is stored in: compiled, the casts of what is float32 are dropped."""

    def __call__(self, x, weight, bias):
        return _eager_linear(x, weight, bias)

    def construct(self, x, weight, bias):
        return _linear(x.astype(ms.float32), weight.astype(ms.float32), bias.astype(ms.float32)).astype(x.dtype)


class _AnyLinearWithoutBias(nn.Cell):
    def __call__(self, x, weight):
        return _eager_linear(x, weight)

    def construct(self, x, weight):
        return _linear_without_bias(x.astype(ms.float32), weight.astype(ms.float32)).astype(x.dtype)


class _AddLowRank(nn.Cell):
    def construct(self, y, x, down, up):
        return _low_rank_forward(y, x, down, up)

    def bprop(self, y, x, down, up, out, dout):
        dx, ddown, dup = _low_rank_backward(dout[0], x, out[1], down, up)
        return dout[0], dx, ddown, dup


# ---- element by element ----

_gelu_forward, _gelu_backward = _kernel("gelu_forward", _first), _kernel("gelu_backward", _first)
_silu_forward, _silu_backward = _kernel("silu_forward", _first), _kernel("silu_backward", _first)
_swiglu_forward = _kernel("swiglu_forward", lambda x: (*x[:-1], x[-1] // 2))
_swiglu_backward = _kernel("swiglu_backward", _second)
_geglu_forward = _kernel("geglu_forward", lambda x: (*x[:-1], x[-1] // 2))
_geglu_backward = _kernel("geglu_backward", _second)
_gated_silu_forward = _kernel("gated_silu_forward", _first)
_gated_silu_backward = _kernel("gated_silu_backward", lambda dy, *_: (dy, dy), 2)


class _GeluTanh(nn.Cell):
    def construct(self, x):
        return _gelu_forward(x)

    def bprop(self, x, out, dout):
        return _gelu_backward(dout, x),


class _SiLU(nn.Cell):
    def construct(self, x):
        return _silu_forward(x)

    def bprop(self, x, out, dout):
        return _silu_backward(dout, x),


class _SwiGLU(nn.Cell):
    def construct(self, x):
        return _swiglu_forward(x)

    def bprop(self, x, out, dout):
        return _swiglu_backward(dout, x),


class _GEGLU(nn.Cell):
    def construct(self, x):
        return _geglu_forward(x)

    def bprop(self, x, out, dout):
        return _geglu_backward(dout, x),


class _GatedSiLU(nn.Cell):
    def construct(self, gate, x):
        return _gated_silu_forward(gate, x)

    def bprop(self, gate, x, out, dout):
        dgate, dx = _gated_silu_backward(dout, gate, x)
        return dgate, dx


# ---- normalisation, modulation, gates, positions ----

_layer_norm_forward = _kernel("layer_norm_modulate_forward", lambda x, *_: (x, (*x[:-1], 2)), 2)
_layer_norm_backward = _kernel("layer_norm_modulate_backward", lambda dy, x, scale, _: (x, scale, scale), 3)
_gate_forward = _kernel("gate_add_forward", _first)
_gate_backward = _kernel("gate_add_backward", lambda dy, gate, x: (x, gate), 2)
_rms_norm_forward = _kernel("rms_norm_forward", _first)
_rms_norm_backward = _kernel("rms_norm_backward", lambda dy, x, weight, eps: (x, weight), 2)
_rotate_forward, _rotate_backward = _kernel("rotate_forward", _first), _kernel("rotate_backward", _first)
_norm_rotate_forward = _kernel("norm_rotate_forward", lambda x, w, cos, *_: (x[0], cos[1], *x[2:]))
_norm_rotate_backward = _kernel("norm_rotate_backward", lambda dy, x, w, *_: (x, w), 2)
_norm_rotate_joint_forward = _kernel("norm_rotate_forward", lambda x, y, v, w, cos, *_: (x[0], cos[1], *x[2:]))
_norm_rotate_joint_backward = _kernel("norm_rotate_backward", lambda dz, x, y, v, w, *_: (x, y, v, w), 4)


class _LayerNormModulate(nn.Cell):
    def construct(self, x, scale, shift, eps):
        return _layer_norm_forward(x, scale, shift, eps)

    def bprop(self, x, scale, shift, eps, out, dout):
        dx, dscale, dshift = _layer_norm_backward(dout[0], x, scale, out[1])
        return dx, dscale, dshift, _zeros_like(eps)


class _GateAdd(nn.Cell):
    def construct(self, residual, gate, x):
        return _gate_forward(residual, gate, x)

    def bprop(self, residual, gate, x, out, dout):
        dx, dgate = _gate_backward(dout, gate, x)
        return dout, dgate, dx


class _RMSNorm(nn.Cell):
    def construct(self, x, weight, eps):
        return _rms_norm_forward(x, weight, eps)

    def bprop(self, x, weight, eps, out, dout):
        dx, dweight = _rms_norm_backward(dout, x, weight, eps)
        return dx, dweight, _zeros_like(eps)


class _NormRotate(nn.Cell):
    def construct(self, x, weight, cos, sin, eps):
        return _norm_rotate_forward(x, weight, cos, sin, eps)

    def bprop(self, x, weight, cos, sin, eps, out, dout):
        dx, dweight = _norm_rotate_backward(dout, x, weight, cos, sin, eps)
        return dx, dweight, _zeros_like(cos), _zeros_like(sin), _zeros_like(eps)


class _NormRotateJoint(nn.Cell):
    def construct(self, x, y, v, w, cos, sin, eps):
        return _norm_rotate_joint_forward(x, y, v, w, cos, sin, eps)

    def bprop(self, x, y, v, w, cos, sin, eps, out, dout):
        dx, dy, dv, dw = _norm_rotate_joint_backward(dout, x, y, v, w, cos, sin, eps)
        return dx, dy, dv, dw, _zeros_like(cos), _zeros_like(sin), _zeros_like(eps)


class _Rotate(nn.Cell):
    def construct(self, x, cos, sin):
        return _rotate_forward(x, cos, sin)

    def bprop(self, x, cos, sin, out, dout):
        return _rotate_backward(dout, cos, sin), _zeros_like(cos), _zeros_like(sin)


# ---- attention ----

def _attended(q, *_):
    return (q[0], q[1], q[2] * q[3]), (q[0], q[2], q[1])


_attention_forward = _kernel("attention_forward", _attended, 2)
_attention_backward = _kernel("attention_backward", lambda dout, out, lse, q, k, v, *_: (q, k, v), 3)


class _Attention(nn.Cell):
    def construct(self, q, k, v):
        return _attention_forward(q, k, v)

    def bprop(self, q, k, v, out, dout):
        return _attention_backward(dout[0], out[0], out[1], q, k, v)


class _MaskedAttention(nn.Cell):
    def construct(self, q, k, v, mask):
        return _attention_forward(q, k, v, mask)

    def bprop(self, q, k, v, mask, out, dout):
        dq, dk, dv = _attention_backward(dout[0], out[0], out[1], q, k, v, mask)
        return dq, dk, dv, _zeros_like(mask)


# ---- images ----

_conv_forward = _kernel("conv2d_forward", lambda x, w, g, _: (
    x[0], w[0], (x[2] + 2 * (g[2] - 1) - w[2]) // g[0] + 1, (x[3] + 2 * (g[3] - 1) - w[3]) // g[1] + 1))
_conv_x = _kernel("conv2d_backward_x", lambda dy, w, g, x: x)
_conv_w = _kernel("conv2d_backward_w", lambda dy, x, g, w: (w, (w[0],)), 2)
_group_norm_forward = _kernel("group_norm_forward", lambda n, g, x, *_: (x, (x[0], g[0], 2)), 2)
_group_norm_backward = _kernel("group_norm_backward", lambda n, dy, x, gamma, beta, _: (x, gamma, beta), 3)
_double_forward = _kernel("double_forward", lambda x: (x[0], x[1], 2 * x[2], 2 * x[3]))
_double_backward = _kernel("double_backward", lambda y: (y[0], y[1], y[2] // 2, y[3] // 2))


class _EagerConvolution(_Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(x, weight, geometry)
        return _conv_forward(x, weight, geometry, bias)

    @staticmethod
    def backward(ctx, dy):
        (x, weight, geometry), wanted = ctx.saved_tensors, ctx.needs_input_grad
        dx = _conv_x(dy, weight, geometry, x) if wanted[0] else None
        dweight, dbias = _conv_w(dy, x, geometry, weight) if wanted[1] or wanted[2] else (None, None)
        return dx, dweight if wanted[1] else None, dbias if wanted[2] else None, None


class _Convolution(nn.Cell):
    def __call__(self, x, weight, bias, geometry):
        return _EagerConvolution.apply(x, weight, bias, geometry)

    def construct(self, x, weight, bias, geometry):
        return _conv_forward(x, weight, geometry, bias)

    def bprop(self, x, weight, bias, geometry, out, dout):
        dweight, dbias = _conv_w(dout, x, geometry, weight)
        return _conv_x(dout, weight, geometry, x), dweight, dbias, _zeros_like(geometry)


class _GroupNorm(nn.Cell):
    def construct(self, x, weight, bias, groups, numbers):
        return _group_norm_forward(numbers, groups, x, weight, bias)

    def bprop(self, x, weight, bias, groups, numbers, out, dout):
        dx, dweight, dbias = _group_norm_backward(numbers, dout[0], x, weight, bias, out[1])
        return dx, dweight, dbias, _zeros_like(groups), _zeros_like(numbers)


class _Double(nn.Cell):
    def construct(self, x):
        return _double_forward(x)

    def bprop(self, x, out, dout):
        return _double_backward(dout),


# ---- the optimizer ----

class AdamW(ops.Custom):
    """`ops.update.AdamW` of ``number`` parameters, changed in place in the order of the program, as by any operator of
    MindSpore that does. Takes the six numbers, parameters, both moments, gradients; the result says that it is done."""

    def __init__(self, number: int):
        numbers = [sig.make_sig(name) for name in ("coefficient", "rate", "decay", "beta1", "beta2", "eps")]
        changed = [sig.make_sig(f"{name}_{k}", sig.sig_rw.RW_WRITE)
                   for name in ("parameter", "moment1", "moment2") for k in range(number)]
        self.__mindspore_signature__ = (*numbers, *changed, *(sig.make_sig(f"gradient_{k}") for k in range(number)))
        super().__init__(f"{library()}:adamw", (1,), ms.float32, "aot")
        self.add_prim_attr("side_effect_mem", True)


_sum_of_squares = _kernel("sum_of_squares", lambda *_: (1,))
_convolution, _group_norm, _double = _Convolution(), _GroupNorm(), _Double()
_linear, _linear_without_bias = _Linear(), _LinearWithoutBias()
_add_low_rank = _AddLowRank()
_any_linear, _any_linear_without_bias = _AnyLinear(), _AnyLinearWithoutBias()
_gelu_tanh, _silu, _swiglu, _geglu, _gated_silu = _GeluTanh(), _SiLU(), _SwiGLU(), _GEGLU(), _GatedSiLU()
_gate_add, _rotate = _GateAdd(), _Rotate()
_layer_norm_modulate, _rms_norm = _LayerNormModulate(), _RMSNorm()
_norm_rotate, _norm_rotate_joint = _NormRotate(), _NormRotateJoint()
_attention, _masked_attention = _Attention(), _MaskedAttention()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, of any dtype. Shapes: x [..., in], weight [out, in], bias [out] -> [..., out], as x."""
    return _any_linear(x, weight, bias)


def linear_without_bias(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, of any dtype. Shapes: x [..., in], weight [out, in] -> [..., out], as x."""
    return _any_linear_without_bias(x, weight)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """y + x down up, of any dtype. Shapes: y [..., out], x [..., in], down [in, r], up [r, out] -> [..., out], as y."""
    tensors = y.astype(ms.float32), x.astype(ms.float32), down.astype(ms.float32), up.astype(ms.float32)
    return _add_low_rank(*tensors)[0].astype(y.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU. Shapes: any."""
    return _gelu_tanh(x)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x). Shapes: any."""
    return _silu(x)


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) second half, halves of the last axis. Shapes: [..., 2 D] -> [..., D]."""
    return _swiglu(x)


def geglu(x: Tensor) -> Tensor:
    """First half gelu(second half), halves of the last axis, with the exact GELU. Shapes: [..., 2 D] -> [..., D]."""
    return _geglu(x)


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) x. Shapes: any, the same for both."""
    return _gated_silu(gate, x)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """norm(x) (1 + scale) + shift, the norm without affine. Shapes: x [B, S, D], scale and shift [B, D]."""
    return _layer_norm_modulate(x, scale, shift, _numbers(eps))[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(x) weight + bias. Shapes: x [B, S, D], weight and bias [D]."""
    rows = x.reshape(1, -1, x.shape[-1])
    return layer_norm_modulate(rows, (weight - 1).expand_dims(0), bias.expand_dims(0), eps).reshape(x.shape)


def gate_add(residual: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """residual + gate x. Shapes: residual and x [B, S, D], gate [B, D]."""
    return _gate_add(residual, gate, x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. Shapes: x [..., D], weight [D]."""
    return _rms_norm(x, weight, _numbers(eps))


def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) (1 + scale). Shapes: x [B, S, D], weight [D], scale [B, D] -> as x."""
    return _rms_norm(x, weight * (scale + 1.0), _numbers(eps))


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`rotate` of `rms_norm`. Shapes: x [B, S, H, D], weight [D], cos and sin [1 or B, S, D] -> as x."""
    return _norm_rotate(x, weight, cos, sin, _numbers(eps))


def norm_rotate_joint(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor, cos: Tensor,
                      sin: Tensor, eps: float) -> Tensor:
    """`rotate` of the tokens of two streams, one after the other, each by its own `rms_norm`.

    Shapes: [B, L, H, D], [B, N, H, D], [D], [D], cos and sin [1 or B, L + N, D] -> [B, L + N, H, D].
    """
    return _norm_rotate_joint(first, second, first_weight, second_weight, cos, sin, _numbers(eps))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of the last axis, turned by their token's angles, whose gradient is zero: positions are constants.

    Shapes: x [B, S, H, D], cos and sin [1 or B, S, D] -> as x.
    """
    return _rotate(x, cos, sin)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T D^-1/2) v. Shapes: q [B, S, H, D], k and v [B, S', H, D] -> [B, S, H D]."""
    return _attention(q, k, v)[0]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T D^-1/2 + mask) v; the mask is added to the scores of a key: [B, S']. It gets a zero gradient."""
    return _masked_attention(q, k, v, mask)[0]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """A convolution of images. Shapes: x [B, C, H, W], weight [C', C, h, w], bias [C'] -> [B, C', H', W']."""
    geometry = _zeros(stride[0], stride[1], 1 + padding[0], 1 + padding[1])  # its shape is what the kernel reads
    return _convolution(x, weight, bias, geometry)


def conv2d_without_bias(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    return conv2d(x, weight, _zeros(weight.shape[0]), stride, padding)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Each group of channels, normalised, scaled and shifted. Shapes: x [B, C, ...], weight and bias [C] -> as x."""
    return _group_norm(x, weight, bias, _zeros(groups), _numbers(eps, 0))[0]


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`group_norm`, and SiLU of it."""
    return _group_norm(x, weight, bias, _zeros(groups), _numbers(eps, 1))[0]


def double(x: Tensor) -> Tensor:
    """Every pixel four times. Shapes: [B, C, H, W] -> [B, C, 2 H, 2 W]."""
    return _double(x)


def sum_of_squares(tensors: tuple[Tensor, ...]) -> Tensor:
    """The sum of the squares of all elements: float32 scalar."""
    return _sum_of_squares(*tensors).reshape(())
