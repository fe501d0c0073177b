"""FLUX.1 (dev and schnell)."""
from __future__ import annotations

from ms_diffsynth.pipeline import Family
from ms_diffsynth.pipelines.flux.pipeline import FluxImagePipeline
from ms_diffsynth.pipelines.flux.published import PUBLISHED, prepared_shapes
from ms_diffsynth.pipelines.flux.tiny import write_tiny

FAMILY = Family(name="flux", pipeline=FluxImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                prepared_shapes=prepared_shapes)
