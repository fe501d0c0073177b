"""EfficientNet-Lite0 up to its pooled features, for inference only.

Source: the PyPI package ``efficientnet-lite-pytorch`` 0.1.0, whose names the weights have; docs/how_to/evaluation.md
says how the two were compared. Batch normalization is folded into the convolutions, and "same" padding, which is
one-sided where the stride is 2, is made symmetric by kernels with a leading row and column of zeros.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from ms_diffsynth import runtime

SIZE = 224  # pixels, both sides

# blocks, expansion, stride of the first; kernels and channels are those of the weights
_STAGES = ((1, 1, 1), (2, 6, 2), (2, 6, 2), (3, 6, 2), (3, 6, 1), (4, 6, 2), (1, 6, 1))
_NORM_EPSILON = 1e-3


class EfficientNetLite0(nn.Cell):
    """Pixels [B, 3, 224, 224], computed as (x - 127) / 128, to features [B, 1280], both float32."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        super().__init__()
        self.stem = _Convolution(weights, "_conv_stem", "_bn0", stride=2)
        blocks = []
        for count, expansion, stride in _STAGES:
            for k in range(count):
                blocks.append(_Block(weights, f"_blocks.{len(blocks)}.", expansion, stride if k == 0 else 1, k > 0))
        self.blocks = nn.SequentialCell(blocks)
        self.head = _Convolution(weights, "_conv_head", "_bn1")

    def construct(self, pixels):
        return self.head(self.blocks(self.stem(pixels))).mean((2, 3))


class PerceptualFeatures(nn.Cell):
    """Pixels float32 [B, 3, H, W] in [-1, 1] to what four of the first layers see of them, float32.

    Sides are multiples of 8. They are those of the stem, [B, 32, H/2, W/2], and of the last block of each of the next
    three stages: 16 channels of the same size, 24 of a quarter and 40 of an eighth of the sides.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        super().__init__()
        self.stem = _Convolution(weights, "_conv_stem", "_bn0", stride=2)
        stages, blocks = [], 0
        for count, expansion, stride in _STAGES[:3]:
            stages.append(nn.SequentialCell([_Block(weights, f"_blocks.{blocks + k}.", expansion,
                                                    stride if k == 0 else 1, k > 0) for k in range(count)]))
            blocks += count
        self.stages = nn.CellList(stages)

    def construct(self, pixels):
        x = self.stem((pixels * 127.5 + 0.5) / 128)
        found = (x,)
        for stage in self.stages:
            x = stage(x)
            found = found + (x,)
        return found


class _Block(nn.Cell):
    """Expand, filter each channel, project; added to its input where the two have one shape."""

    def __init__(self, weights: Mapping[str, np.ndarray], prefix: str, expansion: int, stride: int, is_residual: bool):
        super().__init__()
        layers = [_Convolution(weights, f"{prefix}_expand_conv", f"{prefix}_bn0")] if expansion > 1 else []
        layers.append(_Convolution(weights, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride))
        layers.append(_Convolution(weights, f"{prefix}_project_conv", f"{prefix}_bn2", is_bounded=False))
        self.layers = nn.SequentialCell(layers)
        self.is_residual = is_residual

    def construct(self, x):
        y = self.layers(x)
        return x + y if self.is_residual else y


class _Convolution(nn.Cell):
    """A convolution, dense or of each channel by itself, and ReLU6 if ``is_bounded``."""

    def __init__(self, weights: Mapping[str, np.ndarray], conv: str, norm: str, stride: int = 1,
                 is_bounded: bool = True):
        super().__init__()
        # with the batch normalization behind it: g (w x - mean) / sqrt(var + eps) + b
        gain, shift, mean, variance = (weights[f"{norm}.{name}"].astype(np.float64)
                                       for name in ("weight", "bias", "running_mean", "running_var"))
        scale = gain / np.sqrt(variance + _NORM_EPSILON)
        weight = (weights[f"{conv}.weight"] * scale[:, None, None, None]).astype(np.float32)
        bias = (shift - mean * scale).astype(np.float32)
        if stride == 2:
            weight = np.pad(weight, ((0, 0), (0, 0), (1, 0), (1, 0)))
        self.weight = Parameter(Tensor(weight), requires_grad=False)
        self.bias = Parameter(Tensor(bias), requires_grad=False)
        self.stride, self.padding = stride, (weight.shape[2] - 1) // 2
        self.is_depthwise = weight.shape[1] == 1
        self.is_bounded = is_bounded
        self.on_cpu = runtime.current().device == "CPU"

    def construct(self, x):
        if self.is_depthwise and self.on_cpu:
            y = _depthwise(x, self.weight, self.stride, self.padding)
        else:
            groups = x.shape[1] if self.is_depthwise else 1
            y = mint.nn.functional.conv2d(x, self.weight, None, self.stride, self.padding, 1, groups)
        y = ops.bias_add(y, self.bias)
        return ops.relu6(y) if self.is_bounded else y


def _depthwise(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Each channel by itself, as products with its windows.

    8 images of 32 channels of 112 x 112 pixels take the CPU's grouped Conv2D 240 ms and this 70 ms (MindSpore 2.10,
    2 cores, 2026-11-21).
    """
    batch, channels, size, _ = x.shape
    kernel = weight.shape[2]
    size = (size + 2 * padding - kernel) // stride + 1
    windows = ops.operations.Im2Col((kernel, kernel), (stride, stride), (1, 1), (padding, padding))(x)
    windows = windows.reshape(batch * channels, kernel * kernel, size * size)
    rows = weight.reshape(1, channels, kernel * kernel).broadcast_to((batch, channels, kernel * kernel))
    rows = rows.reshape(batch * channels, 1, kernel * kernel)
    return ops.operations.BatchMatMul()(rows, windows).reshape(batch, channels, size, size)
