"""Qwen-Image."""
from __future__ import annotations

from ms_diffsynth.hub.card import APACHE, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ms_diffsynth.pipelines.qwen_image.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.qwen_image.tiny import write_tiny

LOADER = Loader(here="QwenImagePipeline", diffusers="QwenImagePipeline", mindone="QwenImagePipeline",
                files=("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors"),
                transformer="QwenImageTransformer2DModel", tags=("qwen-image", "qwen-image-diffusers"))

FAMILY = Family(name="qwen_image", pipeline=QwenImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                repositories=REPOSITORIES, activations=Activations(kept=22.9, inside=25.8, encode=5.12, decode=7.02),
                prepared_shapes=prepared_shapes, licences={"Qwen/Qwen-Image": APACHE}, loader=lambda base: LOADER)
