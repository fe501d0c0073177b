"""Convolutions of one to three axes with strides, padding, dilation and groups, and their gradients.

An Ascend computes them in HF32 (fewer bits than float32) where MindSpore's op_precision allows it; here they are in
float32.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from ms_diffsynth.standin.compute.table import Array, aclnn


@aclnn("Convolution", "t t t I I I b I i -> t j")
def convolution(x: Array, weight: Array, bias: Array | None, stride: Sequence[int], padding: Sequence[int],
                dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
                precision: int) -> Array:
    """x (N, C, *size), weight (M, C / groups, *kernel) -> (N, M, *size)."""
    _refuse_transposed(transposed)
    columns, size = _columns(x, weight.shape[2:], stride, padding, dilation, groups)
    filters = weight.reshape(groups, weight.shape[0] // groups, -1)
    result = np.einsum("gmk,ngkp->ngmp", filters, columns, optimize=True).reshape(x.shape[0], weight.shape[0], *size)
    return result if bias is None else result + bias.reshape(1, -1, *(1,) * len(size))


@aclnn("ConvolutionBackward", "t t t I I I I b I j I j -> t t t")
def convolution_gradient(gradient: Array, x: Array, weight: Array, bias_shape: Sequence[int] | None,
                         stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
                         output_padding: Sequence[int], groups: int, wanted: Sequence[int], precision: int) -> tuple:
    """Gradients of x, weight and bias, those that ``wanted`` says."""
    _refuse_transposed(transposed)
    n, m = gradient.shape[:2]
    g = gradient.reshape(n, groups, m // groups, -1)
    to_x = to_weight = to_bias = None
    if wanted[0]:
        filters = weight.reshape(groups, m // groups, -1)
        columns = np.einsum("gmk,ngmp->ngkp", filters, g, optimize=True)
        to_x = _scattered(columns, x.shape, weight.shape[2:], gradient.shape[2:], stride, padding, dilation)
    if wanted[1]:
        columns, _ = _columns(x, weight.shape[2:], stride, padding, dilation, groups)
        to_weight = np.einsum("ngmp,ngkp->gmk", g, columns, optimize=True).reshape(weight.shape)
    if wanted[2]:
        to_bias = gradient.sum((0, *range(2, gradient.ndim)))
    return to_x, to_weight, to_bias


def _refuse_transposed(transposed: bool) -> None:
    if transposed:
        raise NotImplementedError("transposed, it is not computed by the stand-in: write it in compute/convolution.py")


def _per_axis(values: Sequence[int], axes: int) -> list[int]:
    return list(values) if len(values) == axes else [values[0]] * axes


def _columns(x: Array, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
             groups: int) -> tuple[Array, tuple[int, ...]]:
    """What each position of the output sees: (N, groups, C / groups * kernel, positions), and the output's size."""
    axes = len(kernel)
    stride, padding, dilation = (_per_axis(v, axes) for v in (stride, padding, dilation))
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, 2 + axes)))
    step = (slice(None), slice(None), *(slice(None, None, s) for s in (*stride, *dilation)))
    windows = windows[step]
    size = windows.shape[2:2 + axes]
    order = (0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    return windows.transpose(order).reshape(x.shape[0], groups, -1, int(np.prod(size))), size


def _scattered(columns: Array, shape: tuple[int, ...], kernel: Sequence[int], size: Sequence[int],
               stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Array:
    """The transpose of ``_columns``: every position's column added to where it was seen."""
    axes = len(kernel)
    stride, padding, dilation = (_per_axis(v, axes) for v in (stride, padding, dilation))
    columns = columns.reshape(*shape[:2], *kernel, *size)
    padded = np.zeros((*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], padding))), columns.dtype)
    for place in product(*map(range, kernel)):
        seen = tuple(slice(i * d, i * d + s * n, s) for i, d, s, n in zip(place, dilation, stride, size))
        padded[(slice(None), slice(None), *seen)] += columns[(slice(None), slice(None), *place)]
    return padded[(slice(None), slice(None), *(slice(p, p + n) for p, n in zip(padding, shape[2:])))]
