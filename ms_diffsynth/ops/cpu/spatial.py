"""`mindspore.mint.nn.functional`: convolution, padding, pooling and resizing, from primitives that have a CPU kernel.

Compared with NumPy in value and gradient by tests/ops/test_cpu_spatial.py.
"""
from __future__ import annotations

import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.common import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import _primexpr, constexpr

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.ops.cpu.functional import HAS_NATIVE, are_float32, native

HAS_CONVOLUTIONS = HAS_NATIVE and native.HAS_CONVOLUTIONS

__all__ = ["adaptive_avg_pool2d", "avg_pool2d", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "interpolate", "pad"]

_GATHER = P.Gather()
_MATMUL, _BATCH_MATMUL = P.MatMul(), P.BatchMatMul()
_INTERPOLATE = mint.nn.functional.interpolate  # "nearest" has a CPU kernel


@_primexpr
def _each(value, n):
    """``value`` once per spatial dimension."""
    if isinstance(value, (tuple, list)):
        return tuple(value) * n if len(value) == 1 else tuple(value)
    return (value,) * n


@_primexpr
def _both_sides(padding, n):
    """Padding of each dimension -> padding before and after each, as the primitives want it."""
    return tuple(p for p in _each(padding, n) for _ in range(2))


# ---- convolution ----

# MindSpore's Conv2D has no fast kernel for its layout: 16 channels of 128 x 128 pixels take it 229 ms, and 8 ms as a
# matrix product (MindSpore 2.10, 2 cores, 2026-11-21). The columns take kernel-area times the memory of the image, so
# large ones go the slow way: more numbers than this, 256 MB. The native kernel needs neither.
_MOST_COLUMNS = 64 * 1024 * 1024


class _ProductConvolution:
    """A convolution as a product of the weights with the images' windows as columns."""

    def __init__(self, padding, stride, dilation):
        self.padding, self.stride, self.dilation = padding, stride, dilation

    def __call__(self, x, weight):
        channels, kernel = weight.shape[0], weight.shape[2:]
        height, width = _convolved_size(x.shape[2:], kernel, self.stride, self.padding, self.dilation)
        if kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            columns = x.reshape(x.shape[0], x.shape[1], height * width)
        else:
            columns = P.Im2Col(kernel, self.stride, self.dilation, self.padding)(x)
            columns = columns.reshape(x.shape[0], -1, height * width)
        rows = weight.reshape(channels, -1)
        if x.shape[0] == 1:
            return _MATMUL(rows, columns[0]).reshape(1, channels, height, width)
        rows = rows.expand_dims(0).broadcast_to((x.shape[0], *rows.shape))
        return _BATCH_MATMUL(rows, columns).reshape(x.shape[0], channels, height, width)


@_primexpr
def _convolved_size(size, kernel, stride, padding, dilation):
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1
                 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation))


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    x = input if input.ndim == 4 else input.expand_dims(0)
    stride, dilation = _each(stride, 2), _each(dilation, 2)
    if (HAS_CONVOLUTIONS and not isinstance(padding, str) and groups == 1 and dilation == (1, 1)
            and are_float32(x, weight)):
        if bias is None:
            out = native.conv2d_without_bias(x, weight, stride, _each(padding, 2))
        else:
            out = native.conv2d(x, weight, bias, stride, _each(padding, 2))
        return out if input.ndim == 4 else out.squeeze(0)
    if isinstance(padding, str):
        conv = P.Conv2D(weight.shape[0], weight.shape[2:], 1, padding, 0, stride, dilation, groups)
    elif groups == 1 and x.size * weight.shape[2] * weight.shape[3] <= _MOST_COLUMNS:
        conv = _ProductConvolution(_each(padding, 2), stride, dilation)
    else:
        sides = _both_sides(padding, 2)
        conv = P.Conv2D(weight.shape[0], weight.shape[2:], 1, "pad", sides, stride, dilation, groups)
    out = conv(x, weight)
    if bias is not None:
        out = out + bias.reshape(1, -1, 1, 1)
    return out if input.ndim == 4 else out.squeeze(0)


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """A convolution of images one pixel high."""
    if not isinstance(padding, str):
        padding = (0, _each(padding, 1)[0])
    stride, dilation = (1, _each(stride, 1)[0]), (1, _each(dilation, 1)[0])
    return conv2d(input.expand_dims(-2), weight.expand_dims(-2), bias, stride, padding, dilation, groups).squeeze(-2)


def conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    stride, dilation = _each(stride, 3), _each(dilation, 3)
    if isinstance(padding, str):
        conv = P.Conv3D(weight.shape[0], weight.shape[2:], 1, padding, 0, stride, dilation, groups)
    else:
        sides = _both_sides(padding, 3)
        conv = P.Conv3D(weight.shape[0], weight.shape[2:], 1, "pad", sides, stride, dilation, groups)
    out = conv(input, weight)
    return out if bias is None else out + bias.reshape(1, -1, 1, 1, 1)


@_primexpr
def _transposed_size(size, kernel, stride, padding, dilation, extra):
    return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + e
                 for n, k, s, p, d, e in zip(size, kernel, stride, padding, dilation, extra))


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    stride, dilation, padding = _each(stride, 2), _each(dilation, 2), _each(padding, 2)
    size = _transposed_size(input.shape[2:], weight.shape[2:], stride, padding, dilation, _each(output_padding, 2))
    conv = P.Conv2DTranspose(weight.shape[0], weight.shape[2:], "pad", _both_sides(padding, 2), None, 1, stride,
                             dilation, groups)
    out = conv(input, weight, (input.shape[0], weight.shape[1] * groups, *size))
    return out if bias is None else out + bias.reshape(1, -1, 1, 1)


# ---- padding ----

@constexpr
def _source_index(size, before, after, mode):
    """Where each element of a padded axis comes from."""
    index = np.arange(-before, size + after)
    if mode == "reflect":
        index = np.abs(index)
        index = np.where(index >= size, 2 * (size - 1) - index, index)
    elif mode == "circular":
        index = index % size
    elif mode == "replicate":
        index = np.clip(index, 0, size - 1)
    else:
        raise ValueError(f"pad mode='{mode}': expected constant, reflect, replicate or circular.")
    return Tensor(index, mstype.int32)


def _pad_axis(x, axis, before, after, value):
    """``value`` before and after an axis; what is negative is cut off.

    Not by PadV3: of MindSpore 2.10 its kernel tries out numbers of threads in its first calls, and with some of them it
    never returns (tests/ops/test_cpu_spatial.py).
    """
    if before < 0 or after < 0:
        first, size = max(-before, 0), x.shape[axis] + min(before, 0) + min(after, 0)
        x = mint.narrow(x, axis, first, size)
    parts = [x]
    if before > 0:
        parts = [mint.full(x.shape[:axis] + (before,) + x.shape[axis + 1 :], value, dtype=x.dtype)] + parts
    if after > 0:
        parts = parts + [mint.full(x.shape[:axis] + (after,) + x.shape[axis + 1 :], value, dtype=x.dtype)]
    return mint.cat(parts, axis) if len(parts) > 1 else x


def pad(input, pad, mode="constant", value=None):
    for i in range(len(pad) // 2):  # pairs from the last axis backwards
        axis = input.ndim - 1 - i
        if mode == "constant":
            input = _pad_axis(input, axis, pad[2 * i], pad[2 * i + 1], 0.0 if value is None else value)
            continue
        input = _GATHER(input, _source_index(input.shape[axis], pad[2 * i], pad[2 * i + 1], mode), axis)
    return input


# ---- pooling and resizing ----

def avg_pool2d(input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
               divisor_override=None):
    return ops.avg_pool2d(input, kernel_size, kernel_size if stride is None else stride, padding, ceil_mode,
                          count_include_pad, 0 if divisor_override is None else divisor_override)


def adaptive_avg_pool2d(input, output_size):
    return ops.adaptive_avg_pool2d(input, output_size)


@_primexpr
def _resized(shape, size, scale_factor, mode):
    """The new spatial size. Refuses the factors for which the CPU's kernels take other source pixels than PyTorch."""
    old = shape[2:]
    if size is not None:
        new = _each(size, len(old))
    else:
        new = tuple(n * factor for n, factor in zip(old, _each(scale_factor, len(old))))
    if any(n != int(n) for n in new):
        raise DeviceError(f"interpolate by scale_factor={scale_factor} from {old} on the CPU: expected whole "
                          "output sizes. Give size= instead.")
    if mode == "nearest-exact" and any(n % o for n, o in zip(new, old)):
        raise DeviceError(f"interpolate in mode nearest-exact from {old} to {new} on the CPU: expected whole "
                          "factors, for which it equals nearest.")
    if mode == "bicubic":  # MindSpore 2.10's is up to 14 % of the largest value off, 0.1 % with align_corners
        raise DeviceError(f"interpolate in mode bicubic from {old} to {new} on the CPU: MindSpore's kernel computes it "
                          "wrongly. Use mode='bilinear', or resize the image on the host with Pillow.")
    return tuple(int(n) for n in new)


@_primexpr
def _doubled(shape):
    return tuple(2 * n for n in shape[2:]) if len(shape) == 4 else None


def interpolate(input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None):
    size = _resized(input.shape, size, scale_factor, mode)
    if mode in ("nearest", "nearest-exact"):
        if HAS_NATIVE and are_float32(input) and size == _doubled(input.shape):
            return native.double(input)
        return _INTERPOLATE(input, size, None, "nearest")
    return ops.interpolate(input, size=size, mode=mode, align_corners=align_corners)


# ---- `construct` of cells that call a primitive instead of a function ----

def _convolve(cell, input, convolution):
    padding = cell.padding
    if cell.padding_mode != "zeros":
        input, padding = pad(input, cell._reversed_padding, mode=cell.padding_mode), 0
    return convolution(input, cell.weight, cell.bias, cell.stride, padding, cell.dilation, cell.groups)


def conv1d_construct(self, input):
    return _convolve(self, input, conv1d)


def conv2d_construct(self, input):
    return _convolve(self, input, conv2d)


def conv3d_construct(self, input):
    return _convolve(self, input, conv3d)


def avg_pool2d_construct(self, input):
    return avg_pool2d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
                      self.divisor_override)
