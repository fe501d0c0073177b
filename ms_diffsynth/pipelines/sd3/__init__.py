"""Stable Diffusion 3 and 3.5."""
from __future__ import annotations

from ms_diffsynth.hub.card import Licence, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.sd3.pipeline import SD3ImagePipeline
from ms_diffsynth.pipelines.sd3.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.sd3.tiny import write_tiny

_HUB = "https://huggingface.co/stabilityai"
LICENCES = {
    **{f"stabilityai/{name}": Licence("other", "stabilityai-ai-community", f"{_HUB}/{name}/blob/main/LICENSE.md")
       for name in ("stable-diffusion-3.5-large", "stable-diffusion-3.5-medium")},
    "stabilityai/stable-diffusion-3-medium-diffusers": Licence(
        "other", "stabilityai-nc-research-community", f"{_HUB}/stable-diffusion-3-medium-diffusers/blob/main/LICENSE"),
}
LOADER = Loader(here="SD3ImagePipeline", diffusers="StableDiffusion3Pipeline", mindone="StableDiffusion3Pipeline",
                files=("transformer/*.safetensors", "text_encoder/model.safetensors",  # beside them are copies in fp16
                       "text_encoder_2/model.safetensors", "text_encoder_3/model-*.safetensors", "vae/*.safetensors"),
                transformer="SD3Transformer2DModel", tags=("sd3", "sd3-diffusers"))

FAMILY = Family(name="sd3", pipeline=SD3ImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                repositories=REPOSITORIES, activations=Activations(kept=17.9, inside=21.8, encode=4.08, decode=6.01),
                prepared_shapes=prepared_shapes, licences=LICENCES, loader=lambda base: LOADER)
