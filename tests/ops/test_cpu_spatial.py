"""Convolution, padding, pooling and resizing equal NumPy in value and gradient."""
from __future__ import annotations

import itertools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint
from reference import STRICT, Case, check

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.ops.cpu import spatial

F = mint.nn.functional


def convolve(x, weight, bias, stride, padding, dilation, groups):
    """Correlation of [N, C, ...] with [O, C / groups, ...] by its definition; padding as (before, after) pairs."""
    x = np.pad(x, [(0, 0), (0, 0), *padding])
    kernel = weight.shape[2:]
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation)]
    out = np.zeros((x.shape[0], weight.shape[0], *size))
    inputs, outputs = x.shape[1] // groups, weight.shape[0] // groups
    for tap in itertools.product(*map(range, kernel)):
        window = tuple(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in zip(tap, dilation, stride, size))
        for g in range(groups):
            taken = x[(slice(None), slice(g * inputs, (g + 1) * inputs), *window)]
            matrix = weight[(slice(g * outputs, (g + 1) * outputs), slice(None), *tap)]
            out[:, g * outputs:(g + 1) * outputs] += np.einsum("oc,nc...->no...", matrix, taken)
    return out + bias.reshape(1, -1, *(1 for _ in kernel))


def conv2d(x, weight, bias=None, stride=1, padding=(0, 0), dilation=1, groups=1):
    bias = np.zeros(weight.shape[0]) if bias is None else bias
    pairs = [p if isinstance(p, tuple) else (p, p) for p in padding]
    return convolve(x, weight, bias, (stride, stride), pairs, (dilation, dilation), groups)


def conv1d(x, weight, bias):
    return convolve(x, weight, bias, (2,), [(1, 1)], (1,), 1)


def conv3d(x, weight, bias):
    return convolve(x, weight, bias, (1, 1, 2), [(1, 1), (0, 0), (1, 1)], (1, 1, 1), 1)


def transpose_conv2d(x, weight, bias):
    """Stride 2, padding 1, output padding 1: every input pixel adds its kernel to the output."""
    n, _, h, w = x.shape
    _, outputs, kh, kw = weight.shape
    full = np.zeros((n, outputs, 2 * (h - 1) + kh + 1, 2 * (w - 1) + kw + 1))
    for i, j in np.ndindex(h, w):
        full[:, :, 2 * i:2 * i + kh, 2 * j:2 * j + kw] += np.einsum("nc,cokl->nokl", x[:, :, i, j], weight)
    return full[:, :, 1:-1, 1:-1] + bias.reshape(1, -1, 1, 1)


def bilinear(x, factor):
    """Half-pixel centres, edges repeated: resize by a whole factor."""
    for axis in (2, 3):
        size = x.shape[axis]
        at = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, np.minimum(low + 1, size - 1), axis) * share
    return x


def average(x, kernel, padding=0):
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    h, w = x.shape[2] // kernel, x.shape[3] // kernel
    return x[:, :, :h * kernel, :w * kernel].reshape(*x.shape[:2], h, kernel, w, kernel).mean((3, 5))


def edges(before_after, mode):
    return lambda x: np.pad(x, [(0, 0), (0, 0), *before_after], mode=mode)


IMAGE = (1, 2, 4, 3)
CASES = [
    Case(name="conv2d", function=F.conv2d, inputs=[IMAGE, (2, 2, 3, 3), (2,)], settings={"padding": 1},
         reference=lambda x, w, b: conv2d(x, w, b, padding=(1, 1))),
    Case(name="conv2d stride, uneven padding", function=F.conv2d, inputs=[IMAGE, (2, 2, 3, 2)],
         settings={"stride": 2, "padding": (1, 0)}, reference=lambda x, w: conv2d(x, w, stride=2, padding=(1, 0))),
    Case(name="conv2d groups, dilation", function=F.conv2d, inputs=[(1, 2, 4, 4), (2, 1, 2, 2)],
         settings={"groups": 2, "dilation": 2}, reference=lambda x, w: conv2d(x, w, dilation=2, groups=2)),
    Case(name="conv2d same", function=F.conv2d, inputs=[IMAGE, (2, 2, 2, 3)], settings={"padding": "same"},
         reference=lambda x, w: conv2d(x, w, padding=((0, 1), 1))),
    Case(name="conv2d 1x1", function=F.conv2d, inputs=[IMAGE, (3, 2, 1, 1)], reference=conv2d),
    Case(name="conv2d 1x1 stride", function=F.conv2d, inputs=[IMAGE, (3, 2, 1, 1)], settings={"stride": 2},
         reference=lambda x, w: conv2d(x, w, stride=2)),
    Case(name="conv2d dilation", function=F.conv2d, inputs=[IMAGE, (2, 2, 2, 2)],
         settings={"dilation": 2, "padding": 1}, reference=lambda x, w: conv2d(x, w, dilation=2, padding=(1, 1))),
    Case(name="conv2d of one image", function=F.conv2d, inputs=[(2, 3, 3), (1, 2, 2, 2)],
         reference=lambda x, w: conv2d(x[None], w)[0]),
    Case(name="conv1d", function=F.conv1d, inputs=[(2, 2, 5), (2, 2, 3), (2,)], settings={"stride": 2, "padding": 1},
         reference=conv1d),
    Case(name="conv3d", function=F.conv3d, inputs=[(1, 2, 2, 3, 3), (2, 2, 2, 2, 2), (2,)],
         settings={"stride": (1, 1, 2), "padding": (1, 0, 1)}, reference=conv3d),
    Case(name="conv_transpose2d", function=F.conv_transpose2d, inputs=[IMAGE, (2, 2, 3, 2), (2,)],
         settings={"stride": 2, "padding": 1, "output_padding": 1}, reference=transpose_conv2d),
    Case(name="pad", function=F.pad, inputs=[IMAGE], settings={"pad": (0, 1, 2, 0), "value": 0.5},
         reference=lambda x: np.pad(x, [(0, 0), (0, 0), (2, 0), (0, 1)], constant_values=0.5)),
    Case(name="pad reflect", function=F.pad, inputs=[IMAGE], settings={"pad": (2, 1, 1, 3), "mode": "reflect"},
         reference=edges([(1, 3), (2, 1)], "reflect")),
    Case(name="pad replicate", function=F.pad, inputs=[IMAGE], settings={"pad": (0, 2, 1, 0), "mode": "replicate"},
         reference=edges([(1, 0), (0, 2)], "edge")),
    Case(name="pad circular", function=F.pad, inputs=[IMAGE], settings={"pad": (1, 1, 0, 0), "mode": "circular"},
         reference=edges([(0, 0), (1, 1)], "wrap")),
    Case(name="avg_pool2d", function=F.avg_pool2d, inputs=[IMAGE], settings={"kernel_size": 2},
         reference=lambda x: average(x, 2)),
    Case(name="avg_pool2d padded", function=F.avg_pool2d, inputs=[IMAGE], settings={"kernel_size": 2, "padding": 1},
         reference=lambda x: average(x, 2, 1)),
    Case(name="adaptive_avg_pool2d", function=F.adaptive_avg_pool2d, inputs=[(1, 2, 4, 2)],
         settings={"output_size": (2, 1)}, reference=lambda x: average(x, 2)),
    Case(name="nearest", function=F.interpolate, inputs=[IMAGE], settings={"scale_factor": 2.0},
         reference=lambda x: x.repeat(2, 2).repeat(2, 3)),
    Case(name="nearest-exact by size", function=F.interpolate, inputs=[IMAGE],
         settings={"size": (8, 9), "mode": "nearest-exact"}, reference=lambda x: x.repeat(2, 2).repeat(3, 3)),
    Case(name="bilinear", function=F.interpolate, inputs=[IMAGE], settings={"scale_factor": 2, "mode": "bilinear"},
         reference=lambda x: bilinear(x, 2)),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_equals_numpy(case, compiled):
    check(case, compiled)


CELLS = [
    (mint.nn.Conv1d(2, 2, 3, stride=2, padding=1), (2, 2, 5), conv1d),
    (mint.nn.Conv2d(2, 2, 3, padding=1), IMAGE, lambda x, w, b: conv2d(x, w, b, padding=(1, 1))),
    (mint.nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), IMAGE,
     lambda x, w, b: conv2d(edges([(1, 1), (1, 1)], "reflect")(x), w, b)),
    (mint.nn.Conv3d(2, 2, 2, stride=(1, 1, 2), padding=(1, 0, 1)), (1, 2, 2, 3, 3), conv3d),
    (mint.nn.ConvTranspose2d(2, 2, (3, 2), 2, 1, 1), IMAGE, transpose_conv2d),
    (mint.nn.AvgPool2d(2), IMAGE, lambda x: average(x, 2)),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("cell, shape, reference", CELLS, ids=[f"{i}-{c[0].cls_name}" for i, c in enumerate(CELLS)])
def test_cells_equal_numpy(cell, shape, reference, compiled):
    weights = [p.asnumpy().astype(np.float64) for p in cell.trainable_params()]
    check(Case(name="cell", function=cell, reference=lambda x: reference(x, *weights), inputs=[shape]), compiled)


@pytest.mark.parametrize("settings", [{"scale_factor": 1.3}, {"size": (5, 3), "mode": "nearest-exact"}])
def test_resizing_that_would_differ_from_pytorch_is_refused(settings):
    with pytest.raises(DeviceError, match="expected whole"):
        F.interpolate(mint.ones(IMAGE), **settings)


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_bicubic_kernel_that_is_wrong_is_refused(align_corners):
    with pytest.raises(DeviceError, match=r"in mode bicubic .* computes it wrongly. Use mode='bilinear'"):
        F.interpolate(mint.ones(IMAGE), scale_factor=2, mode="bicubic", align_corners=align_corners)


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_padding_stays_right_in_later_calls(compiled):
    """MindSpore's PadV3, which computes its own gradient with negative numbers, is right in its first call only."""
    x = np.random.default_rng(0).standard_normal((2, 16, 33, 33)).astype(np.float32)

    def cut(x):
        return F.pad(x, (0, -1, -2, 3))

    run = ms.jit(cut, **STRICT) if compiled else cut
    expected = np.pad(x[:, :, 2:, :-1], [(0, 0), (0, 0), (0, 3), (0, 0)])
    for call in range(24):
        assert np.array_equal(run(Tensor(x)).asnumpy(), expected), f"call {call}"


def test_an_unknown_padding_mode_is_named():
    with pytest.raises(ValueError, match="mode='mirror'"):
        F.pad(mint.ones(IMAGE), (1, 1), mode="mirror")


def test_a_picture_too_large_for_columns_is_convolved_all_the_same(monkeypatch):
    x, w = (Tensor(np.random.default_rng(k).standard_normal(shape).astype(np.float32))
            for k, shape in enumerate([(2, 3, 8, 6), (4, 3, 3, 3)]))
    by_product = F.conv2d(x, w, padding=1).asnumpy()
    monkeypatch.setattr(spatial, "_MOST_COLUMNS", 0)
    np.testing.assert_allclose(F.conv2d(x, w, padding=1).asnumpy(), by_product, atol=2e-5)
