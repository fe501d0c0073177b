"""Qwen-Image."""
from __future__ import annotations

from dataclasses import replace

from ms_diffsynth.hub.card import APACHE, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ms_diffsynth.pipelines.qwen_image.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.qwen_image.tiny import (
    write_tiny,
    write_tiny_controlnet,
    write_tiny_edit,
    write_tiny_edit_2509,
    write_tiny_edit_2511,
    write_tiny_inpaint,
)

LOADER = Loader(here="QwenImagePipeline", diffusers="QwenImagePipeline", mindone="QwenImagePipeline",
                files=("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors"),
                transformer="QwenImageTransformer2DModel", tags=("qwen-image", "qwen-image-diffusers"))

VARIANTS = {"edit": write_tiny_edit, "edit-2509": write_tiny_edit_2509, "edit-2511": write_tiny_edit_2511,
            "controlnet": write_tiny_controlnet, "inpaint": write_tiny_inpaint}
LICENCES = dict.fromkeys(("Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2509",
                          "Qwen/Qwen-Image-Edit-2511"), APACHE)


def loader(base_model: str | None) -> Loader:
    """diffusers has a pipeline for text to image, one for the first edit model, and one for the later ones."""
    name = (base_model or "").rpartition("/")[2]
    kind = "EditPlus" if name.startswith("Qwen-Image-Edit-") else "Edit" if name == "Qwen-Image-Edit" else ""
    return replace(LOADER, diffusers=f"QwenImage{kind}Pipeline", mindone=f"QwenImage{kind}Pipeline")


FAMILY = Family(name="qwen_image", pipeline=QwenImagePipeline, write_tiny=write_tiny, tiny_variants=VARIANTS,
                published=PUBLISHED, repositories=REPOSITORIES,
                activations=Activations(kept=22.9, inside=25.8, encode=5.12, decode=7.02),
                prepared_shapes=prepared_shapes, licences=LICENCES, loader=loader)
