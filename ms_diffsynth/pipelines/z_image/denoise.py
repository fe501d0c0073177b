"""How Z-Image's transformer is called: its clock runs backwards, and it answers clean minus noisy."""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, mint, ops

from ms_diffsynth.pipelines.z_image.rotary import MULTIPLE, filled, numbers, table
from ms_diffsynth.units import TensorUnit


class Denoise(TensorUnit):
    """Velocity at noisy latents.

    The network is given 1 - sigma and answers input_latents - noise, so its answer is negated. The text of a sample is
    filled up to a multiple of 32 tokens with a learned one, which is attended to; what is beyond, up to the longest
    text of the batch, is not.

    Shapes: latents float [B, C, H, W], sigma float32 [B], prompt_embeds [B, L, D], prompt_mask float32 [B, L] (1 for
    text, 0 for padding at its end; absent: all text) -> velocity float32 [B, C, H, W]. The network computes in
    ``dtype``, but the time stays float32 up to its sinusoids: bfloat16 keeps 8 bits of it.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "prompt_mask?")
    output_params = ("velocity",)
    onload_model_names = ("dit",)

    def attach(self, pipe):
        super().attach(pipe)
        config = pipe.config("dit")
        self.axes, self.theta = tuple(config["axes_dims"]), float(config["rope_theta"])

    def construct(self, latents, sigma, prompt_embeds, prompt_mask=None):
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        batch, tokens, channels = prompt_embeds.shape
        if prompt_mask is None:
            prompt_mask = ops.ones((batch, tokens), ms.float32)
        prompt_embeds = prompt_embeds.astype(self.dtype)
        rest = filled(tokens) - tokens
        if rest:
            prompt_embeds = ops.cat((prompt_embeds, ops.zeros((batch, rest, channels), prompt_embeds.dtype)), 1)
            prompt_mask = ops.cat((prompt_mask, ops.zeros((batch, rest), ms.float32)), 1)
        lengths = mint.ceil(prompt_mask.sum(1) / MULTIPLE) * MULTIPLE
        keys = (numbers(tokens + rest) < lengths.reshape(batch, 1)).astype(ms.float32)
        cos, sin = table(lengths, height, width, tokens + rest, self.axes, self.theta)
        patches = self.dit(to_patches(latents).astype(self.dtype), 1 - sigma.astype(ms.float32), prompt_embeds,
                           prompt_mask, keys, cos, sin)
        return (from_patches(-patches.astype(ms.float32), height, width),)


def to_patches(latents: Tensor) -> Tensor:
    """[B, C, 2 h, 2 w] -> [B, h w, 4 C]: in a patch row, column, channel, in this order (FLUX.1 has the channel first).

    Source: diffusers 0.36, ZImageTransformer2DModel._patchify_image.
    """
    batch, channels, height, width = latents.shape
    cut = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return ops.transpose(cut, (0, 2, 4, 3, 5, 1)).reshape(batch, height * width // 4, 4 * channels)


def from_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `to_patches`; ``height`` and ``width`` in patches."""
    batch, _, values = patches.shape
    cut = patches.reshape(batch, height, width, 2, 2, values // 4)
    return ops.transpose(cut, (0, 5, 1, 3, 2, 4)).reshape(batch, values // 4, 2 * height, 2 * width)
