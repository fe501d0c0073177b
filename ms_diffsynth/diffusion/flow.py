"""Flow matching: the straight path between data and noise, and the words this package uses for it.

    input_latents  x   clean latents, already shifted and scaled by the VAE's factors
    noise          n   a draw from N(0, 1), of the shape of x
    sigma          s   noise level in [0, 1], **1 = pure noise**; always float32, one a sample
    timestep           1000 s; exists only at a network's door
    latents            (1 - s) x + s n
    velocity           d latents / d s = n - x, what the network is trained to predict (the target)
    denoise            denoise(latents, sigma) -> velocity, with the conditions already bound
    density            the distribution of training sigmas (`density`)
    weighting          the loss weight of a sigma (`weighting`)
    schedule           the list of sigmas sampling walks down (`schedule`); shift: a warp of sigma
    guidance_scale     the scale embedded in a distilled network
    cfg_scale          the scale of classifier-free guidance, two branches (`guidance`)

Others call noise x_0 and data x_1, or let t = 1 mean data; not here.

Source: Lipman et al. 2023 (arXiv 2210.02747), Liu et al. 2023 (2209.03003); signs as in Esser et al. 2024 (2403.03206).
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from ms_diffsynth.ops.split import Split

_split_frames = Split(2)


def interpolate(input_latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at ``sigma`` on the straight path from data to noise, (1 - s) x + s n.

    Shapes: input_latents, noise float [B, ...] of any rank; sigma float32 [B] -> float32 [B, ...].
    """
    s = sigma.astype(ms.float32).reshape((sigma.shape[0],) + (1,) * (len(input_latents.shape) - 1))
    return (1.0 - s) * input_latents.astype(ms.float32) + s * noise.astype(ms.float32)


def velocity_target(input_latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity along the path, n - x: the same at every sigma.

    Shapes: input_latents, noise float [B, ...] -> float32 [B, ...].
    """
    return noise.astype(ms.float32) - input_latents.astype(ms.float32)


def with_given(latents: Tensor, given_latents: Tensor) -> Tensor:
    """Latents of a film whose first frames are given.

    Shapes: latents float [B, C, F, h, w], given_latents float [B, C, k, h, w] -> float32 [B, C, F, h, w].
    """
    rest = behind(latents, given_latents.shape[2])
    return ops.cat((given_latents.astype(ms.float32), rest.astype(ms.float32)), 2)


def behind(films: Tensor, count: int) -> Tensor:
    """Films without their first frames: [B, C, F, h, w] -> [B, C, F - count, h, w].

    A slice, or its gradient, would be a kernel of the old path on an Ascend.
    """
    return _split_frames(films, (count, films.shape[2] - count))[1]
