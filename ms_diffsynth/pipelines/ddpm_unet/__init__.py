"""Unconditional images: a UNet on pixels, trained and sampled by denoising diffusion."""
from __future__ import annotations

from ms_diffsynth.hub.card import Loader
from ms_diffsynth.pipeline import Family
from ms_diffsynth.pipelines.ddpm_unet.pipeline import UnconditionalImagePipeline
from ms_diffsynth.pipelines.ddpm_unet.tiny import write_tiny

LOADER = Loader(here="UnconditionalImagePipeline", diffusers="DDPMPipeline", mindone="DDPMPipeline")

FAMILY = Family(name="ddpm_unet", pipeline=UnconditionalImagePipeline, write_tiny=write_tiny,
                loader=lambda base: LOADER)
