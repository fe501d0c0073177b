"""The toy pipeline: every kind of unit a family has, in as few lines as it takes."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ms_diffsynth.diffusion.schedule import FLUX_SCHNELL, Schedule, diffsynth_flux, flow_match_euler
from ms_diffsynth.models import NUMBER, SCALE, SIZE, Component, arguments, optional
from ms_diffsynth.pipelines.shared import vae_units
from ms_diffsynth.pipelines.shared.image import ImagePipeline
from ms_diffsynth.pipelines.shared.tiny import write_model
from ms_diffsynth.pipelines.toy.networks import PATCH, ToyAutoencoder, ToyTextEncoder, ToyTransformer
from ms_diffsynth.units import PipelineUnit, TensorUnit

TOKENS = 16


class TokenizePrompt(PipelineUnit):
    """The prompt's first bytes: str -> int32 [1, 16], padded with zeros."""

    input_params = ("prompt",)
    output_params = ("ids",)

    def process(self, pipe, prompt):
        ids = np.frombuffer(prompt.encode()[:TOKENS].ljust(TOKENS, b"\0"), np.uint8)
        return {"ids": Tensor(ids[None].astype(np.int32))}


class EncodePrompt(TensorUnit):
    """ids int32 [B, 16] -> prompt_embeds float32 [B, 16, D]."""

    input_params = ("ids",)
    output_params = ("prompt_embeds",)
    onload_model_names = ("text_encoder",)

    def construct(self, ids):
        return (self.text_encoder(ids).astype(ms.float32),)


class LoadPixels(PipelineUnit):
    """input_image PIL -> pixels float32 [1, 3, H, W] in [-1, 1]."""

    input_params = ("input_image",)
    output_params = ("pixels",)

    def process(self, pipe, input_image):
        return {"pixels": pipe.preprocess_image(input_image)}


class EncodeImage(vae_units.EncodeImage):
    """pixels float32 [B, 3, H, W] -> moments float32 [B, 2C, H/4, W/4]; computed in ``dtype``."""

    scale_factor = staticmethod(lambda config: PATCH)

    def construct(self, pixels):
        return (self.vae.encode(pixels.astype(self.dtype)).astype(ms.float32),)


class Denoise(TensorUnit):
    """latents [B, C, h, w], sigma [B], prompt_embeds [B, 16, D] -> velocity float32 [B, C, h, w]; by ``dtype``."""

    input_params = ("latents", "sigma", "prompt_embeds", "guidance?")
    output_params = ("velocity",)
    onload_model_names = ("dit",)

    def construct(self, latents, sigma, prompt_embeds, guidance=None):
        velocity = self.dit(latents.astype(self.dtype), sigma.astype(self.dtype), prompt_embeds.astype(self.dtype))
        return (velocity.astype(ms.float32),)


class Decode(vae_units.Decode):
    """latents float32 [B, C, h, w] -> pixels float32 [B, 3, 4h, 4w]; computed in ``dtype``."""

    scale_factor = staticmethod(lambda config: PATCH)

    def construct(self, latents):
        return (self.vae.decode(latents.astype(self.dtype)).astype(ms.float32),)


COMPONENTS = (
    Component(name="text_encoder", folder="text_encoder", class_name="ToyTextEncoder",
              build=lambda config: ToyTextEncoder(**arguments(ToyTextEncoder, config))),
    Component(name="vae", folder="vae", class_name="ToyAutoencoder",
              build=lambda config: vae_units.with_latents(ToyAutoencoder, EncodeImage, Decode)(
                  **arguments(ToyAutoencoder, config)),
              reads={"latent_channels": SIZE, "scaling_factor": SCALE, "shift_factor": optional(NUMBER)},
              encoder=("encoder",)),
    Component(name="dit", folder="transformer", class_name="ToyTransformer",
              build=lambda config: ToyTransformer(**arguments(ToyTransformer, config))),
)

CONFIGS = {
    "text_encoder": {"architectures": ["ToyTextEncoder"], "hidden_size": 16},
    "vae": {"_class_name": "ToyAutoencoder", "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.1},
    "dit": {"_class_name": "ToyTransformer", "latent_channels": 4, "hidden_size": 16},
}


class ToyImagePipeline(ImagePipeline):
    """Text to (very small) image."""

    components = COMPONENTS
    lora_target_modules = ("layer_1", "layer_2")
    lora_prefixes = {"dit": "transformer"}
    fusible = ("encode_image",)
    widths = {"latents": ("latent_channels", -3, 1), "prompt_embeds": ("hidden_size", -1, 1)}
    division_factor = 8

    def build_units(self) -> list:
        return [TokenizePrompt(), EncodePrompt(), LoadPixels(), EncodeImage(self.dtype)]

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def build_decode(self) -> Decode:
        return Decode(self.dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.config("vae")["latent_channels"], height // PATCH, width // PATCH)

    def training_schedule(self, objective: str) -> Schedule:
        return diffsynth_flux(3.0) if objective == "sft" else flow_match_euler(3.0)

    def sampling_sigmas(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> np.ndarray:
        return FLUX_SCHNELL.schedule().sampling(num_inference_steps)


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a toy model with random weights in diffusers format into ``folder``."""
    write_model(folder, "ToyPipeline", COMPONENTS, CONFIGS, seed)
