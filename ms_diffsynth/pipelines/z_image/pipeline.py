"""Z-Image and Z-Image-Turbo: Qwen3-4B as text encoder, FLUX.1's VAE, and a transformer of one stream."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms

from ms_diffsynth.diffusion.schedule import FlowMatchSettings, Grid, Shift, one_to_zero, to_one_nth
from ms_diffsynth.formats.interchange import read_table
from ms_diffsynth.models import SCALE, SIZES, Component, arguments, blocks, columns
from ms_diffsynth.pipeline import SamplingDefaults
from ms_diffsynth.pipelines.shared import autoencoder_kl
from ms_diffsynth.pipelines.shared.autoencoder_kl import AUTOENCODER_KL, Decode, EncodeImage
from ms_diffsynth.pipelines.shared.image import ImagePipeline
from ms_diffsynth.pipelines.shared.text import QWEN3, QWEN3_TOLD_BY, QWEN_TOKENIZER, build_qwen3_tokenizer
from ms_diffsynth.pipelines.shared.vae_units import LoadPixels
from ms_diffsynth.pipelines.z_image import units
from ms_diffsynth.pipelines.z_image.denoise import Denoise
from ms_diffsynth.pipelines.z_image.published import PUBLISHED

UNUSED_LAYER = "model.layers.35."  # the last of Qwen3-4B


def _build_dit(config: dict[str, Any]):
    from ms_diffsynth.pipelines.z_image.transformer import ZImageTransformer  # imports mindone's networks

    return ZImageTransformer(**arguments(ZImageTransformer, config))


def weight_dtype(name: str, dtype: ms.Type) -> ms.Type:
    """float32 for the two small layers that embed the time, as bfloat16 rounds sinusoids by 0.4 %; else ``dtype``."""
    return ms.float32 if name.startswith("t_embedder.") else dtype


def _build_text_encoder(config: dict[str, Any]):
    from ms_diffsynth.pipelines.shared.qwen3 import Qwen3TextEncoder  # imports mindone's networks

    return Qwen3TextEncoder(config, lambda count: (count - 1,))


COMPONENTS = (
    Component(name="tokenizer", folder="tokenizer", build=build_qwen3_tokenizer, default_folder=QWEN_TOKENIZER,
              libraries=("transformers",)),
    Component(name="text_encoder", folder="text_encoder", class_name="Qwen3ForCausalLM", build=_build_text_encoder,
              ignored=("lm_head.", "model.norm.", UNUSED_LAYER), known={"Qwen3-4B": QWEN3["Qwen3-4B"]},
              told_by=QWEN3_TOLD_BY),
    replace(AUTOENCODER_KL, known={"Z-Image": PUBLISHED["Z-Image"]["vae"]}),
    Component(name="dit", folder="transformer", class_name="ZImageTransformer2DModel", build=_build_dit,
              ignored=("norm_final.",),  # of single files; nothing computes with it
              weight_dtype=weight_dtype,
              reads={"axes_dims": SIZES, "rope_theta": SCALE}, known={"Z-Image": PUBLISHED["Z-Image"]["dit"]},
              told_by={"n_layers": blocks("layers."), "n_refiner_layers": blocks("noise_refiner."),
                       "dim": columns("x_pad_token"), "cap_feat_dim": columns("cap_embedder.1.weight")}),
)

# What DiffSynth-Studio's Z-Image LoRA script adapts, refiners included
LORA_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")

# as published; their shift is all that tells the two models apart
BASE, TURBO = FlowMatchSettings(shift=6.0), FlowMatchSettings(shift=3.0)


class ZImagePipeline(ImagePipeline):
    """Text to image with Z-Image and Z-Image-Turbo, and the units its training reuses.

    Without a scheduler_config.json a model is taken for the base model.

    Attributes:
        max_sequence_length: tokens of a prompt in its template that are kept; at most 512.
    """

    components = COMPONENTS
    lora_target_modules = LORA_TARGET_MODULES
    diffusers_class = "ZImagePipeline"
    interchange = read_table(Path(__file__).with_name("interchange.yaml"))
    fusible = ("encode_image",)
    widths = {"latents": ("in_channels", -3, 1), "prompt_embeds": ("cap_feat_dim", -1, 1)}
    prepare_settings = ("max_sequence_length",)
    padded_slots = ("prompt_ids", "prompt_embeds", "prompt_mask")
    prompt_lengths = (64, 128, 256, 512)
    max_sequence_length = 512
    sampling = SamplingDefaults(cfg_scale=5.0, num_inference_steps=50)  # diffusers' guidance_scale 4 is 5 here
    turbo_sampling = SamplingDefaults(cfg_scale=1.0, num_inference_steps=8)
    sft_grid = Grid(one_to_zero, (Shift(3.0),))  # DiffSynth-Studio 2.1.12, FlowMatchScheduler("Z-Image"): of both
    sampling_spacing = staticmethod(to_one_nth)  # by torch: diffusers 0.42, get_default_z_image_sigmas

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), LoadPixels(), EncodeImage(self.dtype)]

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def build_decode(self) -> Decode:
        return Decode(self.dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return autoencoder_kl.latent_shape(self.config("vae"), (height, width))

    def published_scheduler(self) -> FlowMatchSettings:
        """Turbo's where the model's file has its shift, else the base model's."""
        return TURBO if (self.scheduler_config() or {}).get("shift") == TURBO.shift else BASE

    def use_sampling_config(self, config: Mapping[str, Any]) -> None:
        """As `Pipeline.use_sampling_config`; Turbo is sampled in 8 steps without guidance."""
        if self.published_scheduler() is TURBO:
            self.sampling = self.turbo_sampling
        super().use_sampling_config(config)
