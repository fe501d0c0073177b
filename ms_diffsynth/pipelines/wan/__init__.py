"""Wan 2.1 and 2.2: text to video and image to video."""
from __future__ import annotations

from dataclasses import replace

from ms_diffsynth.hub.card import APACHE, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.wan.pipeline import WanVideoPipeline
from ms_diffsynth.pipelines.wan.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.wan.tiny import (
    write_tiny,
    write_tiny_a14b,
    write_tiny_i2v,
    write_tiny_i2v_a14b,
    write_tiny_ti2v,
)

LOADER = Loader(here="WanVideoPipeline", diffusers="WanPipeline", mindone="WanPipeline",
                files=("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors"),
                transformer="WanTransformer3DModel", tags=("wan", "wan-diffusers"))
VARIANTS = {"i2v": write_tiny_i2v, "a14b": write_tiny_a14b, "i2v-a14b": write_tiny_i2v_a14b, "ti2v": write_tiny_ti2v}


def loader(base_model: str | None) -> Loader:
    """diffusers has a pipeline for text to video, and one for image to video."""
    name = (base_model or "").rpartition("/")[2]
    is_image = "-I2V-" in name or "-FLF2V-" in name
    name = "WanImageToVideoPipeline" if is_image else "WanPipeline"
    return replace(LOADER, diffusers=name, mindone=name)


FAMILY = Family(name="wan", pipeline=WanVideoPipeline, write_tiny=write_tiny, tiny_variants=VARIANTS,
                published=PUBLISHED, repositories=REPOSITORIES, prepared_shapes=prepared_shapes,
                activations=Activations(kept=26.1, inside=10.5, encode=5.1, decode=5.3, inner=4.8),
                licences=dict.fromkeys(REPOSITORIES, APACHE), loader=loader)
