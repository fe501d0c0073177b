"""Qwen-Image."""
from __future__ import annotations

from ms_diffsynth.pipeline import Family
from ms_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ms_diffsynth.pipelines.qwen_image.published import PUBLISHED, prepared_shapes
from ms_diffsynth.pipelines.qwen_image.tiny import write_tiny

FAMILY = Family(name="qwen_image", pipeline=QwenImagePipeline, write_tiny=write_tiny, published=PUBLISHED,
                prepared_shapes=prepared_shapes)
