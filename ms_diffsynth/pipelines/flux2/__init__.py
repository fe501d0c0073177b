"""FLUX.2: klein and dev."""
from __future__ import annotations

from ms_diffsynth.pipeline import Family
from ms_diffsynth.pipelines.flux2.pipeline import Flux2ImagePipeline
from ms_diffsynth.pipelines.flux2.published import PUBLISHED, prepared_shapes
from ms_diffsynth.pipelines.flux2.tiny import write_tiny

FAMILY = Family(name="flux2", pipeline=Flux2ImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                prepared_shapes=prepared_shapes)
