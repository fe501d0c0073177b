"""What FLUX.2 encodes: the prompt by Qwen3 or Mistral, images by the VAE; and how latents are decoded.

The VAE's latents [B, c, H/8, W/8] are kept in 2x2 patches, [B, C, H/16, W/16] with C = 4 c, and normalised with the
running mean and variance of the VAE's batch norm, which is never called.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops

from ms_diffsynth.models import class_name_of
from ms_diffsynth.ops.clamp import clamp
from ms_diffsynth.pipelines.flux2.denoise import to_tokens
from ms_diffsynth.pipelines.flux2.prompt import dev_ids, klein_ids
from ms_diffsynth.pipelines.flux2.rotary import edit_places
from ms_diffsynth.pipelines.shared import edit, vae_units
from ms_diffsynth.pipelines.shared.autoencoder_kl import scale_factor
from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.units import PipelineUnit, TensorUnit


class TokenizePrompt(PipelineUnit):
    """The prompt in the template of the text encoder as token ids, padded to a fixed length; a cut is logged.

    Padding is where the tokenizer wants it: behind Qwen3's text, in front of Mistral's.

    Shapes: prompt str -> prompt_ids int32 [1, L], prompt_mask float32 [1, L] (1 for text, 0 for padding); L is
    pipe.max_sequence_length.
    """

    input_params = ("prompt",)
    output_params = ("prompt_ids", "prompt_mask")
    onload_model_names = ("tokenizer",)

    def process(self, pipe, prompt):
        tokenizer, length = pipe.tokenizer, pipe.max_sequence_length
        is_dev = class_name_of(pipe.config("text_encoder")).startswith("Mistral3")
        ids = (dev_ids if is_dev else klein_ids)(tokenizer, prompt)
        if len(ids) > length:
            tell_cut(len(ids), "tokens, template included,", length, prompt)
        ids = ids[:length]
        start = length - len(ids) if tokenizer.padding_side == "left" else 0
        padded, mask = np.full((1, length), tokenizer.pad_token_id, np.int32), np.zeros((1, length), np.float32)
        padded[0, start:start + len(ids)] = ids
        mask[0, start:start + len(ids)] = 1
        return {"prompt_ids": Tensor(padded), "prompt_mask": Tensor(mask)}


class EncodePrompt(TensorUnit):
    """Hidden states of three layers of the text encoder, side by side. Those of padding are kept: FLUX.2 reads them.

    Shapes: prompt_ids int32 [B, L], prompt_mask float32 [B, L] -> prompt_embeds float32 [B, L, 3 D].
    """

    input_params = ("prompt_ids", "prompt_mask")
    output_params = ("prompt_embeds",)
    onload_model_names = ("text_encoder",)
    has_few_shapes = True  # prompts are padded to one length

    def construct(self, prompt_ids, prompt_mask):
        return (self.text_encoder(prompt_ids, prompt_mask).astype(ms.float32),)


FIXED = {"scaling_factor": 1.0}  # of the VAE: its units normalise by themselves, so that nothing is left to scale


class EncodeImage(vae_units.EncodeImage):
    """The VAE's posterior in 2x2 patches, already normalised: mean and log-variance, not a sample, to be cached.

    Shapes: pixels float32 [B, 3, H, W] in [-1, 1] -> moments float32 [B, 2C, H/16, W/16].
    """

    scale_factor, patch = staticmethod(scale_factor), 2

    def attach(self, pipe):
        super().attach(pipe)
        self.eps = float(pipe.config("vae")["batch_norm_eps"])

    def construct(self, pixels):
        return (normalised_moments(self.vae, pixels, self.dtype, self.eps),)


class EncodeEditImage(edit.EncodeEditImage):
    """References by FLUX.2's VAE: the k-th is at t = 10 k.

    Shapes: edit_pixels, a list of float32 [B, 3, h, w] -> edit_latents float32 [B, M, C], edit_places int32 [B, M, 4].
    """

    encode, tokens, places, axes = EncodeImage, staticmethod(to_tokens), staticmethod(edit_places), 4


class Decode(vae_units.Decode):
    """Pixels from latents.

    Shapes: latents float32 [B, C, H/16, W/16] -> pixels float32 [B, 3, H, W], about [-1, 1].
    """

    scale_factor, patch = staticmethod(scale_factor), 2

    def attach(self, pipe):
        super().attach(pipe)
        self.eps = float(pipe.config("vae")["batch_norm_eps"])

    def construct(self, latents):
        mean, variance = statistics(self.vae, self.eps)
        latents = from_patches(latents * ops.sqrt(variance) + mean).astype(self.dtype)
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        return (self.vae.decoder(latents).astype(ms.float32),)


def normalised_moments(vae: nn.Cell, pixels: Tensor, dtype: ms.Type, eps: float) -> Tensor:
    """Mean and log-variance of (z - m) / s, where m and s^2 are the statistics of the VAE's batch norm.

    A shift and a scale of z: the mean becomes (mean - m) / s, the log-variance loses log s^2. The log-variance is
    clamped before, as diffusers does.
    """
    moments = vae.encoder(pixels.astype(dtype))
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    mean, log_variance = mint.chunk(moments.astype(ms.float32), 2, 1)
    shift, variance = statistics(vae, eps)
    log_variance = to_patches(clamp(log_variance, -30.0, 20.0)) - ops.log(variance)
    return ops.cat(((to_patches(mean) - shift) / ops.sqrt(variance), log_variance), 1)


def statistics(vae: nn.Cell, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of each of the C channels of latents, float32 [1, C, 1, 1]."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    return (mean.astype(ms.float32).reshape(1, -1, 1, 1),
            variance.astype(ms.float32).reshape(1, -1, 1, 1) + eps)


def to_patches(z: Tensor) -> Tensor:
    """2x2 patches into channels: [B, c, H, W] -> [B, 4c, H/2, W/2]. Source: diffusers 0.36, _patchify_latents."""
    b, c, h, w = z.shape
    return ops.transpose(z.reshape(b, c, h // 2, 2, w // 2, 2), (0, 1, 3, 5, 2, 4)).reshape(b, 4 * c, h // 2, w // 2)


def from_patches(z: Tensor) -> Tensor:
    """Inverse of `to_patches`."""
    b, c, h, w = z.shape
    return ops.transpose(z.reshape(b, c // 4, 2, 2, h, w), (0, 1, 4, 2, 5, 3)).reshape(b, c // 4, 2 * h, 2 * w)
