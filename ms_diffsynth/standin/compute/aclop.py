"""Operators of the older path, aclop. Their attributes come by name; a constant input (axes, sizes) is an array too."""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from ms_diffsynth.standin.compute.table import Array, aclop

for _name, _function in {
    "Add": lambda x, y: x + y, "Sub": lambda x, y: x - y, "Mul": lambda x, y: x * y, "RealDiv": lambda x, y: x / y,
    "AddN": lambda *terms: sum(terms[1:], terms[0]), "Square": lambda x: x * x,
    "Identity": lambda x: x, "TensorMove": lambda x: x, "Assign": lambda x, y: y, "AssignAdd": lambda x, y: x + y,
    "ZerosLike": lambda x: 0, "OnesLike": lambda x: 1, "Fill": lambda shape, value: value,
    "MulNoNan": lambda x, y: np.where(y == 0, 0, x * y),
    "RsqrtGrad": lambda y, gradient: -0.5 * gradient * y * y * y,
    "ArgMaxV2": lambda x, axis: np.argmax(x, axis.item()),
    "Range": lambda start, limit, step: start + np.arange(math.ceil((limit - start) / step)) * step,
}.items():
    aclop(_name, lambda attributes, *inputs, f=_function: f(*inputs))


def _axes(axes: Array) -> tuple[int, ...] | None:
    return tuple(int(a) for a in axes.reshape(-1)) or None


@aclop("ReduceSum")
def reduce_sum(attributes: dict[str, Any], x: Array, axes: Array) -> Array:
    return np.sum(x, _axes(axes), keepdims=bool(attributes.get("keep_dims")))


@aclop("ReduceMean")
def reduce_mean(attributes: dict[str, Any], x: Array, axes: Array) -> Array:
    return np.mean(x, _axes(axes), keepdims=bool(attributes.get("keep_dims")))


@aclop("BiasAdd")
def bias_add(attributes: dict[str, Any], x: Array, bias: Array) -> Array:
    if attributes.get("data_format", "NHWC") == "NCHW" and x.ndim > 2:
        return x + bias.reshape(1, -1, *(1,) * (x.ndim - 2))
    return x + bias


@aclop("BiasAddGrad")
def bias_add_gradient(attributes: dict[str, Any], gradient: Array) -> Array:
    channels = 1 if attributes.get("data_format", "NHWC") == "NCHW" and gradient.ndim > 2 else gradient.ndim - 1
    return gradient.sum(tuple(axis for axis in range(gradient.ndim) if axis != channels))


@aclop("GatherV2")
def gather(attributes: dict[str, Any], x: Array, index: Array, axis: Array) -> Array:
    if attributes.get("batch_dims"):
        raise NotImplementedError("with batch_dims it is not computed by the stand-in: write it in compute/aclop.py")
    return np.take(x, index, axis.item())


@aclop("ScatterNd")
def scatter_nd(attributes: dict[str, Any], index: Array, values: Array, shape: Array) -> Array:
    """Zeros, and ``values`` added at the places whose first coordinates are the rows of ``index``."""
    result = np.zeros(shape.tolist(), values.dtype)
    np.add.at(result, tuple(np.moveaxis(index, -1, 0)), values)
    return result


@aclop("UnsortedSegmentSum")
def unsorted_segment_sum(attributes: dict[str, Any], x: Array, segments: Array, count: Array) -> Array:
    """The rows of each segment, added up; those of a negative segment are left out."""
    rows = x.reshape(segments.size, *x.shape[segments.ndim:])
    result, segments = np.zeros((count.item(), *rows.shape[1:]), x.dtype), segments.reshape(-1)
    np.add.at(result, segments[segments >= 0], rows[segments >= 0])
    return result


@aclop("GatherNd")
def gather_nd(attributes: dict[str, Any], x: Array, index: Array) -> Array:
    """The last axis of ``index`` counts along the first axes of ``x``."""
    return x[tuple(np.moveaxis(index, -1, 0))]


@aclop("Pack")
def pack(attributes: dict[str, Any], *parts: Array) -> Array:
    return np.stack(parts, int(attributes.get("axis", 0)))


@aclop("Unpack")
def unpack(attributes: dict[str, Any], x: Array) -> Any:
    axis = int(attributes.get("axis", 0))
    parts = tuple(np.take(x, i, axis) for i in range(x.shape[axis]))
    return parts if len(parts) > 1 else parts[0]


def _slices(attributes: dict[str, Any], begin: Array, end: Array, strides: Array) -> tuple:
    """Python's index for a strided slice; bit i of a mask speaks of its entry i."""
    masks = {name: int(attributes.get(f"{name}_mask", 0)) for name in ("begin", "end", "ellipsis", "new_axis",
                                                                       "shrink_axis")}
    index: list[Any] = []
    for i, (a, b, step) in enumerate(zip(begin, end, strides)):
        bits = {name: mask >> i & 1 for name, mask in masks.items()}
        if bits["ellipsis"]:
            index.append(Ellipsis)
        elif bits["new_axis"]:
            index.append(None)
        elif bits["shrink_axis"]:
            index.append(int(a))
        else:
            index.append(slice(None if bits["begin"] else int(a), None if bits["end"] else int(b), int(step)))
    return tuple(index)


@aclop("StridedSlice")
def strided_slice(attributes: dict[str, Any], x: Array, begin: Array, end: Array, strides: Array) -> Array:
    return x[_slices(attributes, begin, end, strides)]


@aclop("StridedSliceGrad")
def strided_slice_gradient(attributes: dict[str, Any], shape: Array, begin: Array, end: Array, strides: Array,
                           gradient: Array) -> Array:
    result = np.zeros([int(n) for n in shape], gradient.dtype)
    part = result[_slices(attributes, begin, end, strides)]
    part[...] = gradient.reshape(part.shape)
    return result


@aclop("LayerNorm")
def layer_norm(attributes: dict[str, Any], x: Array, weight: Array, bias: Array) -> tuple:
    """Returns the result, the mean and the variance."""
    axes = tuple(range(int(attributes.get("begin_norm_axis", 0)) % x.ndim, x.ndim))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    normal = (x - mean) / np.sqrt(variance + np.float32(attributes.get("epsilon", 1e-7)))
    return normal * weight + bias, mean, variance


@aclop("LayerNormGrad")
def layer_norm_gradient(attributes: dict[str, Any], gradient: Array, x: Array, variance: Array, mean: Array,
                        weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of x, weight and bias; the operator is not told the epsilon of the norm."""
    axes, outer = tuple(range(-weight.ndim, 0)), tuple(range(x.ndim - weight.ndim))
    scale = 1 / np.sqrt(np.maximum(variance, np.float32(1e-12)))
    normal, to_normal = (x - mean) * scale, gradient * weight
    to_x = scale * (to_normal - to_normal.mean(axes, keepdims=True)
                    - normal * (to_normal * normal).mean(axes, keepdims=True))
    return to_x, (gradient * normal).sum(outer), gradient.sum(outer)
