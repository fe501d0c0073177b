"""A family of two layers that trains in seconds on a CPU: read it first, and copy it to add a family."""
from __future__ import annotations

from ms_diffsynth.pipeline import Family
from ms_diffsynth.pipelines.toy.pipeline import ToyImagePipeline, write_tiny

FAMILY = Family(name="toy", pipeline=ToyImagePipeline, write_tiny=write_tiny)
