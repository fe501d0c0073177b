"""FLUX.2: klein and dev."""
from __future__ import annotations

from ms_diffsynth.hub.card import APACHE, Licence, Loader
from ms_diffsynth.pipeline import Activations, Family
from ms_diffsynth.pipelines.flux2.pipeline import Flux2ImagePipeline
from ms_diffsynth.pipelines.flux2.published import PUBLISHED, REPOSITORIES, prepared_shapes
from ms_diffsynth.pipelines.flux2.tiny import write_tiny

_HUB = "https://huggingface.co/black-forest-labs"
LICENCES = {
    "black-forest-labs/FLUX.2-dev": Licence("other", "flux-dev-non-commercial-license",
                                            f"{_HUB}/FLUX.2-dev/blob/main/LICENSE.md"),
    "black-forest-labs/FLUX.2-klein-4B": APACHE,
    "black-forest-labs/FLUX.2-klein-base-4B": APACHE,
    **{f"black-forest-labs/{name}": Licence("other", "flux-non-commercial-license",
                                            f"{_HUB}/{name}/blob/main/LICENSE.md")
       for name in ("FLUX.2-klein-9B", "FLUX.2-klein-base-9B")},
}
_FILES = ("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors")
DEV = Loader(here="Flux2ImagePipeline", diffusers="Flux2Pipeline", mindone="Flux2Pipeline", files=_FILES,
             transformer="Flux2Transformer2DModel", tags=("flux2", "flux2-diffusers"))
KLEIN = Loader(here="Flux2ImagePipeline", diffusers="Flux2KleinPipeline", mindone="", files=_FILES,
               transformer="Flux2Transformer2DModel", tags=("flux2-klein", "flux2-klein-diffusers"))


def loader(base_model: str | None) -> Loader:
    """klein has a pipeline of its own in diffusers; a model of unknown name is taken for one."""
    return KLEIN if base_model is None or "klein" in base_model.lower() else DEV


FAMILY = Family(name="flux2", pipeline=Flux2ImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                repositories=REPOSITORIES, activations=Activations(kept=19.2, inside=34.8, encode=4.08, decode=6.01),
                prepared_shapes=prepared_shapes, licences=LICENCES, loader=loader)
