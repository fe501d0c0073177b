"""FLUX.1 (dev and schnell)."""
from __future__ import annotations

from dataclasses import replace

from ms_diffsynth.hub.card import APACHE, Licence, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.flux.pipeline import FluxImagePipeline
from ms_diffsynth.pipelines.flux.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.flux.tiny import (
    write_tiny,
    write_tiny_canny,
    write_tiny_controlnet,
    write_tiny_fill,
    write_tiny_union,
)

_HUB = "https://huggingface.co/black-forest-labs"
LICENCES = {
    **{f"black-forest-labs/FLUX.1-{name}": Licence("other", "flux-1-dev-non-commercial-license",
                                                   f"{_HUB}/FLUX.1-{name}/blob/main/LICENSE.md")
       for name in ("dev", "Kontext-dev", "Fill-dev", "Canny-dev", "Depth-dev")},
    "black-forest-labs/FLUX.1-schnell": APACHE,
}
VARIANTS = {"controlnet": write_tiny_controlnet, "controlnet-union": write_tiny_union, "fill": write_tiny_fill,
            "canny": write_tiny_canny}
LOADER = Loader(here="FluxImagePipeline", diffusers="FluxPipeline", mindone="FluxPipeline",
                files=("transformer/*.safetensors", "text_encoder/*.safetensors", "text_encoder_2/*.safetensors",
                       "vae/*.safetensors"),
                transformer="FluxTransformer2DModel", tags=("flux", "flux-diffusers"))


def loader(base_model: str | None) -> Loader:
    """diffusers has pipelines of their own for Kontext, Fill, and Canny and Depth."""
    kinds = {"kontext": "FluxKontextPipeline", "fill": "FluxFillPipeline", "canny": "FluxControlPipeline",
             "depth": "FluxControlPipeline"}
    name = next((cls for kind, cls in kinds.items() if f"-{kind}-" in (base_model or "").lower()), LOADER.diffusers)
    return replace(LOADER, diffusers=name, mindone=name)


FAMILY = Family(name="flux", pipeline=FluxImagePipeline, write_tiny=write_tiny, tiny_variants=VARIANTS,
                published=PUBLISHED,
                repositories=REPOSITORIES, activations=Activations(kept=15.0, inside=18.2, encode=4.08, decode=6.01),
                prepared_shapes=prepared_shapes, licences=LICENCES, loader=loader)
