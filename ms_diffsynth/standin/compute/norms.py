"""Normalisations and their gradients. Means and reciprocal standard deviations are kept in float32 for the gradient."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ms_diffsynth.standin.compute.table import Array, aclnn


@aclnn("LayerNorm", "t I t t d -> t t t")
def layer_norm(x: Array, shape: Sequence[int], weight: Array | None, bias: Array | None, epsilon: float) -> tuple:
    """Over the last axes, those of ``shape``. Returns the result, the mean and 1 / the standard deviation."""
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    mean = x.mean(axes, keepdims=True)
    reciprocal = 1 / np.sqrt(x.var(axes, keepdims=True) + np.float32(epsilon))
    return _affine((x - mean) * reciprocal, weight, bias), mean, reciprocal


@aclnn("LayerNormBackward", "t t I t t t t I -> t t t")
def layer_norm_gradient(gradient: Array, x: Array, shape: Sequence[int], mean: Array, reciprocal: Array,
                        weight: Array | None, bias: Array | None, wanted: Sequence[int]) -> tuple:
    axes, outer = tuple(range(x.ndim - len(shape), x.ndim)), tuple(range(x.ndim - len(shape)))
    kept = x.shape[:len(outer)] + (1,) * len(shape)
    reciprocal = reciprocal.reshape(kept)
    normal = (x - mean.reshape(kept)) * reciprocal
    inner = gradient if weight is None else gradient * weight
    to_x = reciprocal * (inner - inner.mean(axes, keepdims=True) - normal * (inner * normal).mean(axes, keepdims=True))
    return to_x, (gradient * normal).sum(outer), gradient.sum(outer)


@aclnn("GroupNorm", "t t t i i i i d -> t t t")
def group_norm(x: Array, weight: Array | None, bias: Array | None, n: int, channels: int, size: int, groups: int,
               epsilon: float) -> tuple:
    """Over the channels of a group, of (N, C, *)."""
    grouped = x.reshape(n, groups, -1)
    mean = grouped.mean(-1, keepdims=True)
    reciprocal = 1 / np.sqrt(grouped.var(-1, keepdims=True) + np.float32(epsilon))
    by_channel = (1, -1) + (1,) * (x.ndim - 2)
    weight, bias = (None if p is None else p.reshape(by_channel) for p in (weight, bias))
    return _affine(((grouped - mean) * reciprocal).reshape(x.shape), weight, bias), mean, reciprocal


@aclnn("GroupNormBackward", "t t t t t i i i i I -> t t t")
def group_norm_gradient(gradient: Array, x: Array, mean: Array, reciprocal: Array, weight: Array | None, n: int,
                        channels: int, size: int, groups: int, wanted: Sequence[int]) -> tuple:
    reciprocal = reciprocal.reshape(n, groups, 1)
    normal = (x.reshape(n, groups, -1) - mean.reshape(n, groups, 1)) * reciprocal
    by_channel = gradient.reshape(n, channels, -1)
    inner = (by_channel if weight is None else by_channel * weight.reshape(1, -1, 1)).reshape(n, groups, -1)
    to_x = reciprocal * (inner - inner.mean(-1, keepdims=True) - normal * (inner * normal).mean(-1, keepdims=True))
    return (to_x.reshape(x.shape), (by_channel * normal.reshape(n, channels, -1)).sum((0, 2)), by_channel.sum((0, 2)))


@aclnn("RmsNorm", "t t d -> t t")
def rms_norm(x: Array, weight: Array, epsilon: float) -> tuple:
    """x / sqrt(mean(x^2) + epsilon) * weight over the axes of ``weight``. Returns also the reciprocal of the root."""
    axes = tuple(range(x.ndim - weight.ndim, x.ndim))
    reciprocal = 1 / np.sqrt((x * x).mean(axes, keepdims=True) + np.float32(epsilon))
    return x * reciprocal * weight, reciprocal


@aclnn("AddRmsNorm", "t t t d -> t t t")
def add_rms_norm(x: Array, y: Array, weight: Array, epsilon: float) -> tuple:
    """`rms_norm` of a sum, and the sum: what MindSpore makes of both in a graph."""
    return *rms_norm(x + y, weight, epsilon), x + y


@aclnn("RmsNormGrad", "t t t t -> t t")
def rms_norm_gradient(gradient: Array, x: Array, reciprocal: Array, weight: Array) -> tuple:
    axes, outer = tuple(range(x.ndim - weight.ndim, x.ndim)), tuple(range(x.ndim - weight.ndim))
    reciprocal = reciprocal.reshape(x.shape[:len(outer)] + (1,) * weight.ndim)
    normal, inner = x * reciprocal, gradient * weight
    return reciprocal * (inner - normal * (inner * normal).mean(axes, keepdims=True)), (gradient * normal).sum(outer)


def _affine(x: Array, weight: Array | None, bias: Array | None) -> Array:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
