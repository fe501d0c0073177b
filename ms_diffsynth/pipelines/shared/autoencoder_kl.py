"""The VAE of FLUX.1 and Stable Diffusion 3: mindone's AutoencoderKL, and its two units."""
from __future__ import annotations

from typing import Any

import mindspore as ms

from ms_diffsynth.models import NUMBER, SCALE, SIZE, SIZES, Component, arguments, columns, optional
from ms_diffsynth.pipelines.shared import vae_units
from ms_diffsynth.pipelines.shared.quiet import quiet_imports


def build_autoencoder_kl(config: dict[str, Any]):
    with quiet_imports():
        from mindone.diffusers import AutoencoderKL

    return vae_units.with_latents(AutoencoderKL, EncodeImage, Decode)(**arguments(AutoencoderKL, config))


# config.json of FLUX.1's, which other families have too
FLUX_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "act_fn": "silu", "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "force_upcast": True, "mid_block_add_attention": True, "use_quant_conv": False,
    "use_post_quant_conv": False}
AUTOENCODER_KL = Component(
    name="vae", folder="vae", class_name="AutoencoderKL", build=build_autoencoder_kl,
    reads={"latent_channels": SIZE, "block_out_channels": SIZES, "scaling_factor": SCALE,
           "shift_factor": optional(NUMBER)}, told_by={"latent_channels": columns("decoder.conv_in.weight")},
    encoder=("encoder", "quant_conv"))


def scale_factor(config: dict[str, Any]) -> int:
    """Pixels per latent pixel: each level of the VAE but the last halves the sides."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def latent_shape(config: dict[str, Any], size: tuple[int, int]) -> tuple[int, int, int]:
    """Shape of the latents of an image of (height, width) pixels."""
    return (config["latent_channels"], *(side // scale_factor(config) for side in size))


class EncodeImage(vae_units.EncodeImage):
    """The VAE's posterior: mean and log-variance, not a sample, so that it can be cached.

    Shapes: pixels float32 [B, 3, H, W] in [-1, 1] -> moments float32 [B, 2C, H/8, W/8].
    """

    scale_factor = staticmethod(scale_factor)

    def construct(self, pixels):
        return (self.vae.encode(pixels.astype(self.dtype))[0].astype(ms.float32),)


class Decode(vae_units.Decode):
    """Pixels from latents.

    Shapes: latents float32 [B, C, H/8, W/8] -> pixels float32 [B, 3, H, W], about [-1, 1].
    """

    scale_factor = staticmethod(scale_factor)

    def attach(self, pipe):
        super().attach(pipe)
        config = pipe.config("vae")
        self.scaling_factor, self.shift_factor = config["scaling_factor"], config.get("shift_factor") or 0.0

    def construct(self, latents):
        latents = latents / self.scaling_factor + self.shift_factor
        return (self.vae.decode(latents.astype(self.dtype), return_dict=False)[0].astype(ms.float32),)
