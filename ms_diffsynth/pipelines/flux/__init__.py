"""FLUX.1 (dev and schnell)."""
from __future__ import annotations

from dataclasses import replace

from ms_diffsynth.hub.card import APACHE, Licence, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.flux.pipeline import FluxImagePipeline
from ms_diffsynth.pipelines.flux.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.flux.tiny import write_tiny

_HUB = "https://huggingface.co/black-forest-labs"
LICENCES = {
    "black-forest-labs/FLUX.1-dev": Licence("other", "flux-1-dev-non-commercial-license",
                                            f"{_HUB}/FLUX.1-dev/blob/main/LICENSE.md"),
    "black-forest-labs/FLUX.1-Kontext-dev": Licence("other", "flux-1-dev-non-commercial-license",
                                                    f"{_HUB}/FLUX.1-Kontext-dev/blob/main/LICENSE.md"),
    "black-forest-labs/FLUX.1-schnell": APACHE,
}
LOADER = Loader(here="FluxImagePipeline", diffusers="FluxPipeline", mindone="FluxPipeline",
                files=("transformer/*.safetensors", "text_encoder/*.safetensors", "text_encoder_2/*.safetensors",
                       "vae/*.safetensors"),
                transformer="FluxTransformer2DModel", tags=("flux", "flux-diffusers"))


def loader(base_model: str | None) -> Loader:
    """diffusers has a pipeline of its own for Kontext."""
    is_kontext = "kontext" in (base_model or "").lower()
    return replace(LOADER, diffusers="FluxKontextPipeline", mindone="FluxKontextPipeline") if is_kontext else LOADER


FAMILY = Family(name="flux", pipeline=FluxImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                repositories=REPOSITORIES, activations=Activations(kept=15.0, inside=18.2, encode=4.08, decode=6.01),
                prepared_shapes=prepared_shapes, licences=LICENCES, loader=loader)
