"""How Wan's transformers are called: latents as patches, with a condition in further channels, and a time per frame."""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.diffusion.flow import with_given
from ms_diffsynth.units import TensorUnit


class Denoise(TensorUnit):
    """Velocity at noisy latents.

    Shapes: latents float [B, C, F, h, w], sigma float32 [B], prompt_embeds [B, L, D], condition [B, C', F, h, w] of a
    network that takes further channels, image_embeds [B, I, D'] of one that takes image tokens, given_latents
    [B, C, k, h, w], the first frames of a network that completes a film: they are clean and at time 0 -> velocity
    float32 [B, C, F, h, w], in which nobody may read those of given frames. The network computes in ``dtype``, but the
    time stays float32 up to its sinusoids: bfloat16 keeps 8 bits of it.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "condition?", "image_embeds?", "given_latents?")
    output_params = ("velocity",)
    onload_model_names = ("dit",)

    def __init__(self, dtype: ms.Type):
        super().__init__(dtype)
        self.name = "denoise"

    def construct(self, latents, sigma, prompt_embeds, condition=None, image_embeds=None, given_latents=None):
        frames, height, width = latents.shape[2:]
        time = sigma.astype(ms.float32).reshape(-1, 1) * 1000
        if given_latents is not None:
            latents = with_given(latents, given_latents)
            time = time * is_free(frames, given_latents.shape[2])
        if condition is not None:
            latents = ops.cat((latents.astype(ms.float32), condition.astype(ms.float32)), 1)
        if image_embeds is not None:
            image_embeds = image_embeds.astype(self.dtype)
        patches = self.call(to_patches(latents).astype(self.dtype), time, prompt_embeds.astype(self.dtype),
                            (frames, height // 2, width // 2), image_embeds)
        return (from_patches(patches.astype(ms.float32), frames, height, width),)

    def call(self, patches, time, prompt_embeds, sides, image_embeds):
        return self.dit(patches, time, prompt_embeds, sides, image_embeds)


class DenoiseLittle(Denoise):
    """The same by the second network, Wan 2.2's expert for little noise."""

    onload_model_names = ("dit2",)

    def call(self, patches, time, prompt_embeds, sides, image_embeds):
        return self.dit2(patches, time, prompt_embeds, sides, image_embeds)


@ops.constexpr
def is_free(frames: int, given: int) -> Tensor:
    """1 for frames that are not given: float32 [1, frames]."""
    return Tensor((np.arange(frames) >= given).astype(np.float32)[None])


def to_patches(latents: Tensor) -> Tensor:
    """[B, C, F, h, w] -> [B, F h w / 4, C 4]: in a patch channel, row and column, in this order."""
    batch, channels, frames, height, width = latents.shape
    cut = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    return ops.transpose(cut, (0, 2, 3, 5, 1, 4, 6)).reshape(batch, -1, 4 * channels)


def from_patches(patches: Tensor, frames: int, height: int, width: int) -> Tensor:
    """[B, F h w / 4, 4 C], in a patch row, column and channel -> [B, C, F, h, w]: another order than `to_patches`."""
    batch, _, values = patches.shape
    cut = patches.reshape(batch, frames, height // 2, width // 2, 2, 2, values // 4)
    return ops.transpose(cut, (0, 6, 1, 2, 4, 3, 5)).reshape(batch, values // 4, frames, height, width)
