"""Z-Image: the base model and Turbo."""
from __future__ import annotations

from ms_diffsynth.hub.card import APACHE, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.z_image.pipeline import ZImagePipeline
from ms_diffsynth.pipelines.z_image.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.z_image.tiny import write_tiny

LICENCES = {"Tongyi-MAI/Z-Image": APACHE, "Tongyi-MAI/Z-Image-Turbo": APACHE}
LOADER = Loader(here="ZImagePipeline", diffusers="ZImagePipeline", mindone="",
                files=("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors"),
                transformer="ZImageTransformer2DModel", tags=("z-image", "z-image-diffusers"))

FAMILY = Family(name="z_image", pipeline=ZImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                repositories=REPOSITORIES, activations=Activations(kept=21.8, inside=26.7, encode=4.08, decode=6.01),
                prepared_shapes=prepared_shapes, licences=LICENCES, loader=lambda base: LOADER)
