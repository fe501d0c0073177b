"""Stable Diffusion XL: the base model, and its finetunes that predict epsilon or v."""
from __future__ import annotations

from ms_diffsynth.hub.card import Licence, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.sdxl.pipeline import SDXLPipeline
from ms_diffsynth.pipelines.sdxl.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.sdxl.tiny import write_tiny

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
LICENCES = {BASE: Licence("openrail++")}
LOADER = Loader(here="SDXLPipeline", diffusers="StableDiffusionXLPipeline", mindone="StableDiffusionXLPipeline",
                # by their whole names: beside them are copies in float16
                files=("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                       "text_encoder_2/model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
                transformer="UNet2DConditionModel", folder="unet",
                tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"))

# for each pixel of the latents and channel of the first level; ``kept`` of each of its 6 levels
ACTIVATIONS = Activations(kept=61.3, inside=67, encode=4.08, decode=6.01)

FAMILY = Family(name="sdxl", pipeline=SDXLPipeline, write_tiny=write_tiny, published=PUBLISHED,
                repositories=REPOSITORIES, activations=ACTIVATIONS, prepared_shapes=prepared_shapes, licences=LICENCES,
                loader=lambda base: LOADER)
