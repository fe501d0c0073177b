"""Stable Diffusion 3 and 3.5."""
from __future__ import annotations

from ms_diffsynth.pipeline import Family
from ms_diffsynth.pipelines.sd3.pipeline import SD3ImagePipeline
from ms_diffsynth.pipelines.sd3.published import PUBLISHED, prepared_shapes
from ms_diffsynth.pipelines.sd3.tiny import write_tiny

FAMILY = Family(name="sd3", pipeline=SD3ImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                prepared_shapes=prepared_shapes)
