"""AutoencoderKL, EfficientNet-Lite0's first layers and the loss of the task ``autoencoder``, in NumPy and float64.

Written from the equations and the layouts of the published weights, not from the package's code.
"""
from __future__ import annotations

import numpy as np


def convolve(x, weight, bias=None, stride=1, before=0, after=None, groups=1):
    """[B, C, H, W] with [M, C / groups, k, k], zeros around it."""
    after = before if after is None else after
    x = np.pad(x, [(0, 0), (0, 0), (before, after), (before, after)])
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    if groups == 1:
        y = np.einsum("bchwij,mcij->bmhw", windows, weight, optimize=True)
    else:
        y = np.einsum("bchwij,cij->bchw", windows, weight[:, 0])
    return y if bias is None else y + bias[:, None, None]


def silu(x):
    return x / (1 + np.exp(-x))


class Autoencoder:
    """``weights`` by the names of diffusers."""

    def __init__(self, weights, levels, groups):
        self.weights = {name: array.astype(np.float64) for name, array in weights.items()}
        self.levels, self.groups = levels, groups

    def conv(self, name, x, **how):
        return convolve(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **how)

    def norm(self, name, x):
        grouped = x.reshape(x.shape[0], self.groups, -1)
        normal = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-6)
        return (normal.reshape(x.shape) * self.weights[f"{name}.weight"][:, None, None]
                + self.weights[f"{name}.bias"][:, None, None])

    def resnet(self, name, x):
        y = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", x)), before=1)
        y = self.conv(f"{name}.conv2", silu(self.norm(f"{name}.norm2", y)), before=1)
        return y + (self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.weights else x)

    def attention(self, name, x):
        tokens = self.norm(f"{name}.group_norm", x).reshape(*x.shape[:2], -1).swapaxes(1, 2)
        linear = {part: tokens @ self.weights[f"{name}.{part}.weight"].T + self.weights[f"{name}.{part}.bias"]
                  for part in ("to_q", "to_k", "to_v")}
        scores = linear["to_q"] @ linear["to_k"].swapaxes(1, 2) / np.sqrt(x.shape[1])
        scores = np.exp(scores - scores.max(2, keepdims=True))
        mixed = scores / scores.sum(2, keepdims=True) @ linear["to_v"]
        mixed = mixed @ self.weights[f"{name}.to_out.0.weight"].T + self.weights[f"{name}.to_out.0.bias"]
        return x + mixed.swapaxes(1, 2).reshape(x.shape)

    def middle(self, name, x):
        x = self.attention(f"{name}.attentions.0", self.resnet(f"{name}.resnets.0", x))
        return self.resnet(f"{name}.resnets.1", x)

    def ends(self, side, x):
        return self.conv(f"{side}.conv_out", silu(self.norm(f"{side}.conv_norm_out", x)), before=1)

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, before=1)
        for k in range(self.levels):
            x = self.resnet(f"encoder.down_blocks.{k}.resnets.0", x)
            if k < self.levels - 1:
                x = self.conv(f"encoder.down_blocks.{k}.downsamplers.0.conv", x, stride=2, before=0, after=1)
        return self.ends("encoder", self.middle("encoder.mid_block", x))

    def decode(self, x):
        x = self.middle("decoder.mid_block", self.conv("decoder.conv_in", x, before=1))
        for k in range(self.levels):
            for layer in range(2):
                x = self.resnet(f"decoder.up_blocks.{k}.resnets.{layer}", x)
            if k < self.levels - 1:
                x = self.conv(f"decoder.up_blocks.{k}.upsamplers.0.conv", x.repeat(2, 2).repeat(2, 3), before=1)
        return self.ends("decoder", x)


# blocks of a stage, expansion, stride
STAGES = ((1, 1, 1), (2, 6, 2), (2, 6, 2))


def features(weights, pixels):
    """Four layers of EfficientNet-Lite0, as PyTorch's implementation names its weights."""
    def layer(x, conv, norm, stride=1, is_bounded=True):
        kernel = weights[f"{conv}.weight"].astype(np.float64)
        size, groups = kernel.shape[2], x.shape[1] if kernel.shape[1] == 1 and kernel.shape[0] == x.shape[1] else 1
        before, after = ((size - 1) // 2, (size - 1) // 2) if stride == 1 else ((size - 2) // 2, (size - 1) // 2)
        y = convolve(x, kernel, None, stride, before, after, groups)
        gain, shift, mean, variance = (weights[f"{norm}.{name}"].astype(np.float64)[:, None, None]
                                       for name in ("weight", "bias", "running_mean", "running_var"))
        y = (y - mean) / np.sqrt(variance + 1e-3) * gain + shift
        return np.clip(y, 0, 6) if is_bounded else y

    x = layer((pixels * 127.5 + 127.5 - 127) / 128, "_conv_stem", "_bn0", 2)
    found, number = [x], 0
    for count, expansion, stride in STAGES:
        for k in range(count):
            block = f"_blocks.{number}."
            y = layer(x, f"{block}_expand_conv", f"{block}_bn0") if expansion > 1 else x
            y = layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride if k == 0 else 1)
            y = layer(y, f"{block}_project_conv", f"{block}_bn2", is_bounded=False)
            x, number = x + y if k else y, number + 1
        found.append(x)
    return found


def perceptual_distance(weights, one, other):
    total = 0
    for a, b in zip(features(weights, one), features(weights, other)):
        a, b = (x / np.sqrt((x**2).sum(1, keepdims=True) + 1e-6) for x in (a, b))
        total = total + ((a - b)**2).sum(1).mean((1, 2))
    return total / 4


def losses(vae, eff, pixels, noise, mse_weight=2.0, perceptual_weight=0.15, kl_weight=3e-4):
    """The loss of each image, and its reconstruction."""
    mean, log_variance = np.split(vae.encode(pixels), 2, 1)
    image = vae.decode(mean + np.exp(log_variance / 2) * noise)
    error = image - pixels
    divergence = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    return (np.abs(error).mean((1, 2, 3)) + mse_weight * (error**2).mean((1, 2, 3))
            + perceptual_weight * perceptual_distance(eff, image, pixels)
            + kl_weight * divergence.mean((1, 2, 3))), image
