"""Element by element: arithmetic, comparisons, activations and their gradients."""
from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

from ms_diffsynth.standin.compute.table import Array, aclnn

for _name, _function in {
    "Abs": np.abs, "Neg": np.negative, "Reciprocal": lambda x: 1 / x, "Sqrt": np.sqrt,
    "Rsqrt": lambda x: 1 / np.sqrt(x), "Exp": np.exp, "Log": np.log,
    "Sin": np.sin, "Cos": np.cos, "Tanh": np.tanh, "Floor": np.floor, "Ceil": np.ceil,
    "Sign": np.sign, "Erf": erf, "IsFinite": np.isfinite, "LogicalNot": lambda x: np.logical_not(x.astype(bool)),
    "Relu": lambda x: np.maximum(x, 0), "Sigmoid": lambda x: sigmoid(x), "Silu": lambda x: x * sigmoid(x),
}.items():
    aclnn(_name, "t -> t", _function)

for _name, _function in {
    "Mul": np.multiply, "Div": np.divide, "Minimum": np.minimum, "Maximum": np.maximum, "PowTensorTensor": np.power,
    "LtTensor": np.less, "LeTensor": np.less_equal, "GtTensor": np.greater, "GeTensor": np.greater_equal,
    "EqTensor": np.equal, "NeTensor": np.not_equal, "LogicalAnd": np.logical_and, "LogicalOr": np.logical_or,
}.items():
    aclnn(_name, "t t -> t", _function)

for _name, _function in {
    "Muls": np.multiply, "Divs": np.divide, "PowTensorScalar": np.power, "RemainderTensorScalar": np.mod,
    "LtScalar": np.less, "LeScalar": np.less_equal, "GtScalar": np.greater, "GeScalar": np.greater_equal,
    "EqScalar": np.equal, "NeScalar": np.not_equal, "ClampMin": np.maximum,
}.items():
    aclnn(_name, "t s -> t", _function)

aclnn("Cast", "r j -> t", lambda x, dtype: x)
aclnn("PowScalarTensor", "s t -> t", np.power)
aclnn("Add", "t t s -> t", lambda x, y, alpha: x + y * alpha)
aclnn("Sub", "t t s -> t", lambda x, y, alpha: x - y * alpha)
aclnn("Adds", "t s s -> t", lambda x, y, alpha: x + y * alpha)
aclnn("Subs", "t s s -> t", lambda x, y, alpha: x - y * alpha)
aclnn("Clamp", "t s s -> t", lambda x, low, high: np.clip(x, low, high))
aclnn("SWhere", "r t t -> t", lambda condition, x, y: np.where(condition, x, y))
aclnn("Polar", "t t -> t", lambda radius, angle: radius * np.exp(1j * angle))

aclnn("InplaceAdd", "&t t s", lambda x, y, alpha: x + y * alpha)
aclnn("InplaceSub", "&t t s", lambda x, y, alpha: x - y * alpha)
aclnn("InplaceMul", "&t t", lambda x, y: x * y)
aclnn("InplaceDiv", "&t t", lambda x, y: x / y)
aclnn("InplaceAdds", "&t s s", lambda x, y, alpha: x + y * alpha)
aclnn("InplaceMuls", "&t s", lambda x, y: x * y)
aclnn("InplaceOne", "&t", lambda x: 1)
aclnn("InplaceZero", "&t", lambda x: 0)
aclnn("InplaceFillScalar", "&t s", lambda x, value: value)
aclnn("InplaceFillTensor", "&t t", lambda x, value: value)
aclnn("InplaceMaskedFillScalar", "&t r s", lambda x, mask, value: np.where(mask.astype(bool), value, x))
aclnn("InplaceMaskedFillTensor", "&t r t", lambda x, mask, value: np.where(mask.astype(bool), value, x))

aclnn("TanhBackward", "t t -> t", lambda gradient, y: gradient * (1 - y * y))
aclnn("SigmoidBackward", "t t -> t", lambda gradient, y: gradient * y * (1 - y))
aclnn("ThresholdBackward", "t t s -> t", lambda gradient, x, threshold: np.where(x > threshold, gradient, 0))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


@aclnn("SiluBackward", "t t -> t")
def silu_gradient(gradient: Array, x: Array) -> Array:
    s = sigmoid(x)
    return gradient * s * (1 + x * (1 - s))


@aclnn("SwiGlu", "t i -> t")
def swiglu(x: Array, axis: int) -> Array:
    first, second = np.split(x, 2, axis)
    return first * sigmoid(first) * second


@aclnn("SwiGluGrad", "t t i -> t")
def swiglu_gradient(gradient: Array, x: Array, axis: int) -> Array:
    first, second = np.split(x, 2, axis)
    return np.concatenate([silu_gradient(gradient * second, first), gradient * first * sigmoid(first)], axis)


@aclnn("GeluV2", "t i -> t")
def gelu(x: Array, tanh: int) -> Array:
    """GELU, exact (0) or by its approximation with tanh (1)."""
    if tanh:
        return np.float32(0.5) * x * (1 + np.tanh(_inner(x)))
    return np.float32(0.5) * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


@aclnn("GeluBackwardV2", "t t c -> t")
def gelu_gradient(gradient: Array, x: Array, approximate: str) -> Array:
    if approximate == "tanh":
        t = np.tanh(_inner(x))
        slope = np.float32(math.sqrt(2 / math.pi)) * (1 + np.float32(3 * 0.044715) * x * x)
        return gradient * (np.float32(0.5) * (1 + t) + np.float32(0.5) * x * (1 - t * t) * slope)
    density = np.exp(np.float32(-0.5) * x * x) * np.float32(1 / math.sqrt(2 * math.pi))
    return gradient * (np.float32(0.5) * (1 + erf(x * np.float32(math.sqrt(0.5)))) + x * density)


def _inner(x: Array) -> Array:
    return np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
