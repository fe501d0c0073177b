"""The sinusoidal embedding of timestep and guidance, its frequencies computed on the host.

A device's exp may be good to 5e-6 relative only, as the CPU's is: multiplied by timesteps of up to 3500 that shifts the
sine's argument by 0.02 and costs 4e-3 in the worst gradient of a tiny FLUX network (MindSpore 2.10, 2026-11-21). NumPy
has no such error. Our own networks call it, and a network of mindone is given it where its weights are loaded.
"""
from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common import dtype as mstype
from mindspore.ops.primitive import constexpr

# Of the 128 frequencies of all published transformers two lie near the middle of two floats, 0.02 of their distance
# below it, and PyTorch's exp on a CPU (MKL 2024.2) takes the upper. At a timestep of 1000 that moves a sine by 3e-5,
# and the velocity of a tiny Z-Image by 1e-5, more than everything else together (2026-11-30).
UPPER = {(128, 0, 10000): (12, 106)}


@constexpr
def _frequencies(half, downscale_freq_shift, max_period):
    """`frequencies`, a constant."""
    return Tensor(frequencies(half, downscale_freq_shift, max_period))


def frequencies(half, downscale_freq_shift, max_period):
    """max_period^(-i / (half - shift)): exponents rounded to float32 as the reference has them, exp exact."""
    exponent = -math.log(max_period) * np.arange(half, dtype=np.float32) / np.float32(half - downscale_freq_shift)
    found = np.exp(exponent.astype(np.float64)).astype(np.float32)
    for k in UPPER.get((half, downscale_freq_shift, max_period), ()):
        found[k] = np.nextafter(found[k], np.float32(1))
    return found


def get_timestep_embedding(timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1,
                           max_period=10000):
    """sin and cos of timesteps times geometric frequencies.

    Shapes: timesteps [B], result [B, embedding_dim] float32.
    Source: get_timestep_embedding of diffusers 0.39.
    """
    half = embedding_dim // 2
    angle = scale * (timesteps.astype(mstype.float32).expand_dims(1)
                     * _frequencies(half, downscale_freq_shift, max_period).expand_dims(0))
    pair = (ops.cos(angle), ops.sin(angle)) if flip_sin_to_cos else (ops.sin(angle), ops.cos(angle))
    out = ops.cat(pair, axis=-1)
    if embedding_dim % 2 == 1:
        out = ops.pad(out, (0, 1))
    return out


class Sinusoids(nn.Cell):
    """`get_timestep_embedding` with the settings of a cell `Timesteps` of mindone, in the place of it.

    Shapes: as `get_timestep_embedding`.
    """

    def __init__(self, timesteps: nn.Cell):
        super().__init__()
        self.settings = (timesteps.num_channels, timesteps.flip_sin_to_cos, timesteps.downscale_freq_shift,
                         timesteps.scale)

    def construct(self, timesteps):
        return get_timestep_embedding(timesteps, *self.settings)
