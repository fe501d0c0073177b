"""`mindspore.mint.nn.functional`: linear maps, norms, activations, losses, from primitives that have a CPU kernel.

The CPU's exp is good to 5e-6 relative and its tanh to 1e-4 absolute, sigmoid and erf to 8e-7 and 5e-8 (20,000 values
against float64, MindSpore 2.10, 2026-11-21): tanh is never called, exp only where its error is damped. Compared with
NumPy in value and gradient by tests/ops/test_cpu_functional.py.
"""
from __future__ import annotations

from mindspore import mint, ops
from mindspore.common import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import _primexpr

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.ops.cpu.native.build import library
from ms_diffsynth.ops.cpu.tensor import norm

HAS_NATIVE = library() is not None
if HAS_NATIVE:
    from ms_diffsynth.ops.cpu.native import kernels as native
else:
    native = None  # the compiler looks the name up also where nothing calls it

__all__ = ["dropout", "embedding", "gelu", "group_norm", "layer_norm", "linear", "logsigmoid", "mish", "mse_loss",
           "normalize", "silu", "softplus"]

_DENSE = mint.nn.functional.linear  # has a CPU kernel
_ERF = P.Erf()
_GROUP_NORM, _SILU = mint.nn.functional.group_norm, mint.nn.functional.silu  # have one too
_GATHER = P.Gather()


def are_float32(*tensors):
    for x in tensors:
        if x.dtype != mstype.float32:
            return False
    return True


# ---- linear maps ----

def linear(input, weight, bias=None):
    """Without native kernels folded to two dimensions: the gradient of Dense takes 8.7 ms in three and 4.3 in two."""
    if HAS_NATIVE and are_float32(input, weight) and weight.ndim == 2:
        if bias is None:
            return native.linear_without_bias(input, weight)
        if bias.ndim == 1 and are_float32(bias):
            return native.linear(input, weight, bias)
    if input.ndim > 2:
        out = _DENSE(input.reshape(-1, input.shape[-1]), weight, bias)
        return out.reshape((*input.shape[:-1], weight.shape[0]))
    return _DENSE(input, weight, bias)


@_primexpr
def _check_embedding(max_norm, scale_grad_by_freq):
    if max_norm is not None or scale_grad_by_freq:
        raise DeviceError(f"embedding with max_norm={max_norm}, scale_grad_by_freq={scale_grad_by_freq} on "
                          "the CPU: expected None and False. Normalise the weight yourself.")


def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False):
    """Row ``padding_idx`` gets no gradient."""
    _check_embedding(max_norm, scale_grad_by_freq)
    out = _GATHER(weight, input, 0)
    if padding_idx is None:
        return out
    keep = (input != padding_idx % weight.shape[0]).expand_dims(-1).broadcast_to(out.shape)
    return ops.select(keep, out, ops.stop_gradient(out))


# ---- norms ----

def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    first = input.ndim - (1 if isinstance(normalized_shape, int) else len(normalized_shape))
    shape = input.shape[first:]
    weight = ops.ones(shape, input.dtype) if weight is None else weight.astype(input.dtype)
    bias = ops.zeros(shape, input.dtype) if bias is None else bias.astype(input.dtype)
    return P.LayerNorm(first, first, eps)(input, weight, bias)[0]


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    if HAS_NATIVE and weight is not None and bias is not None and are_float32(input, weight, bias):
        return native.group_norm(input, num_groups, weight, bias, eps)
    return _GROUP_NORM(input, num_groups, weight, bias, eps)


def rms_norm(x, gamma, epsilon=1e-6):
    """``ops.rms_norm``: the normalised x times gamma, and the reciprocal root mean square in float32."""
    x32 = x.astype(mstype.float32)
    rstd = ops.rsqrt(ops.square(x32).mean(-1, keep_dims=True) + epsilon)
    return (x32 * rstd).astype(x.dtype) * gamma.astype(x.dtype), rstd


def normalize(input, p=2.0, dim=1, eps=1e-12):
    return input / ops.maximum(norm(input, p, dim, True), eps)


# ---- activations ----

def gelu(input, *, approximate="none"):
    """Composed: the GeLU primitive's CPU kernel is ten times slower. 0.5 x (1 + tanh z) = x sigmoid(2 z)."""
    if approximate == "tanh" and HAS_NATIVE and are_float32(input):
        return native.gelu_tanh(input)
    if approximate == "tanh":
        return input * ops.sigmoid(1.5957691216057308 * (input + 0.044715 * input * input * input))
    return 0.5 * input * (1.0 + _ERF(input * 0.7071067811865476))


def silu(input, inplace=False):
    if HAS_NATIVE and are_float32(input) and not inplace:
        return native.silu(input)
    return _SILU(input, inplace)


def softplus(input, beta=1, threshold=20):
    z = input * beta
    out = ops.maximum(z, 0.0) + ops.log1p(ops.exp(-ops.abs(z)))
    return ops.select(z > threshold, z, out) / beta


def logsigmoid(input):
    return -softplus(-input)


def mish(input):
    """x tanh(y), with tanh y = 2 sigmoid(2 y) - 1."""
    return input * (2.0 * ops.sigmoid(2.0 * softplus(input)) - 1.0)


# ---- dropout and loss ----

def dropout(input, p=0.5, training=True, inplace=False):
    if not training or p == 0:
        return input
    keep = (ops.rand(*input.shape, dtype=mstype.float32) >= p).astype(input.dtype)
    return input * keep / (1 - p)


def mse_loss(input, target, reduction="mean"):
    square = ops.square(input - target)
    if reduction == "none":
        return square
    return square.mean() if reduction == "mean" else square.sum()


# ---- `construct` of cells that call a primitive instead of a function ----

def linear_construct(self, x):
    return linear(x, self.weight, self.bias)


def group_norm_construct(self, input):
    return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def embedding_construct(self, input):
    return embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)


def dropout_construct(self, input):
    return dropout(input, self.p, self.training)
