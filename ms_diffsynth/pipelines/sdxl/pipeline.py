"""Stable Diffusion XL: text encoders CLIP-L and CLIP-G, a VAE with 4 channels, and a UNet trained by denoising
diffusion."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth.diffusion.ddpm import LatentDDPMObjective
from ms_diffsynth.formats.interchange import read_table
from ms_diffsynth.models import SIZES, Component, arguments, columns
from ms_diffsynth.pipeline import SamplingDefaults
from ms_diffsynth.pipelines.sdxl import units
from ms_diffsynth.pipelines.sdxl.denoise import Denoise
from ms_diffsynth.pipelines.sdxl.published import ENCODER_2, PUBLISHED, SCHEDULE, SCHEDULER
from ms_diffsynth.pipelines.shared import autoencoder_kl
from ms_diffsynth.pipelines.shared.autoencoder_kl import AUTOENCODER_KL, Decode, EncodeImage
from ms_diffsynth.pipelines.shared.denoising import DenoisingDiffusion, DiffusionScheduler, integrate
from ms_diffsynth.pipelines.shared.image import ImagePipeline
from ms_diffsynth.pipelines.shared.scheduler import Scheduler
from ms_diffsynth.pipelines.shared.text import (
    CLIP_G_TOKENIZER,
    CLIP_L,
    CLIP_TOKENIZER,
    CLIP_TOLD_BY,
    build_clip,
    build_clip_g,
    build_clip_tokenizer,
)
from ms_diffsynth.pipelines.shared.vae_units import LoadPixels


def _build_unet(config: dict[str, Any]):
    from ms_diffsynth.pipelines.sdxl.unet import FIXED, SDXLUNet

    return SDXLUNet(**arguments(SDXLUNet, config, FIXED))


_ATTENTION = "mid_block.attentions.0.transformer_blocks.0"
_TOKENIZER = {"build": build_clip_tokenizer, "libraries": ("transformers", "ftfy")}
# logit_scale: of CLIP's training, in single files
_CLIP = {"ignored": ("text_model.embeddings.position_ids", "logit_scale"), "told_by": CLIP_TOLD_BY}
COMPONENTS = (
    Component(name="tokenizer_1", folder="tokenizer", default_folder=CLIP_TOKENIZER, **_TOKENIZER),
    Component(name="tokenizer_2", folder="tokenizer_2", default_folder=CLIP_G_TOKENIZER, **_TOKENIZER),
    Component(name="text_encoder_1", folder="text_encoder", class_name="CLIPTextModel", build=build_clip,
              known={"CLIP-L": CLIP_L}, **_CLIP),
    Component(name="text_encoder_2", folder="text_encoder_2", class_name="CLIPTextModelWithProjection",
              build=build_clip_g, known={"CLIP-G": ENCODER_2}, **_CLIP),
    replace(AUTOENCODER_KL, known={"SDXL-base": PUBLISHED["SDXL-base"]["vae"]},
            weight_dtype=lambda name, dtype: ms.float32),  # its activations overflow in float16
    Component(name="unet", folder="unet", class_name="UNet2DConditionModel", build=_build_unet,
              reads={"block_out_channels": SIZES},
              known={name: configs["unet"] for name, configs in PUBLISHED.items()},
              told_by={"cross_attention_dim": columns(f"{_ATTENTION}.attn2.to_k.weight")}),
)


class SDXLPipeline(DenoisingDiffusion, ImagePipeline):
    """Text to image with Stable Diffusion XL, and the units its training reuses. The VAE computes in float32.

    Sampling goes through latents x + s n, whose s is `NoiseSchedule.sampling_sigmas`.
    """

    components = COMPONENTS
    objective_class = LatentDDPMObjective
    published = SCHEDULE
    division_factor = 32  # the UNet halves the latents twice
    latent_patch = 1
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")  # those of diffusers' train_dreambooth_lora_sdxl.py
    encoder_lora_target_modules = dict.fromkeys(("text_encoder_1", "text_encoder_2"),
                                                ("q_proj", "k_proj", "v_proj", "out_proj"))
    diffusers_class = "StableDiffusionXLPipeline"
    interchange = read_table(Path(__file__).with_name("interchange.yaml"))
    fusible = ("encode_image",)
    widths = {"latents": ("in_channels", -3, 1), "prompt_embeds": ("cross_attention_dim", -1, 1)}
    samplers = ("euler", "heun", "ddim", "ddpm")
    sampling = SamplingDefaults(cfg_scale=5.0, num_inference_steps=50)

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), units.SizeConditions(), LoadPixels(),
                EncodeImage(ms.float32)]

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def build_decode(self) -> Decode:
        return Decode(ms.float32)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return autoencoder_kl.latent_shape(self.config("vae"), (height, width))

    @property
    def zeroed_slots(self) -> tuple[str, ...]:
        """As `ImagePipeline.zeroed_slots`, where model_index.json does not say otherwise."""
        is_zero = self.store.index.get("force_zeros_for_empty_prompt", True)
        return ("prompt_embeds", "pooled_prompt_embeds") if is_zero else ()

    def published_scheduler_config(self) -> dict[str, Any]:
        return dict(SCHEDULER)

    # -- sampling ------------------------------------------------------------------------------------------------

    def sampling_sigmas(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> np.ndarray:
        return self.noise_schedule.sampling_sigmas(num_inference_steps)

    @property
    def scheduler(self) -> Scheduler:
        return DiffusionScheduler(self)

    def start(self, input_image: Image.Image | None, noise: np.ndarray, sigmas: np.ndarray,
              tiling: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        """As `ImagePipeline.start`, at x + s n."""
        if input_image is None:
            noise = noise * np.float32(self.noise_schedule.first_scale(float(sigmas[0])))
        return super().start(input_image, noise, sigmas, tiling)

    def integrate(self, positive: dict[str, Any], negative: dict[str, Any] | None, latents: np.ndarray | Tensor,
                  sigmas: np.ndarray, cfg_scale: float = 1.0, on_step: Callable[[int, int], None] | None = None,
                  sampler: str = "euler", noise: Callable[[int], np.ndarray] | None = None) -> Tensor:
        """As `ImagePipeline.integrate`, from latents x + s n; ``ddpm`` needs ``noise``."""
        return integrate(self.noise_schedule, self.guided(positive, negative, cfg_scale), Tensor(latents), sigmas,
                         sampler, noise, on_step)
