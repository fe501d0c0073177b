"""The configuration of one training run: a YAML file of sections, overruled by flags, checked before anything loads."""
from ms_diffsynth.config.loading import NO_TOKEN, TOKEN_FLAGS, load_config, to_yaml, validate
from ms_diffsynth.config.settings import (
    SAMPLE_OVERRIDES,
    SECTIONS,
    SETTINGS,
    DataSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    RunSection,
    TrainConfig,
    flat,
    prompts_of,
)

__all__ = ["NO_TOKEN", "SAMPLE_OVERRIDES", "SECTIONS", "SETTINGS", "TOKEN_FLAGS", "DataSection", "ModelSection",
           "ObjectiveSection", "OptimizerSection", "RunSection", "TrainConfig", "flat", "load_config", "prompts_of",
           "to_yaml", "validate"]
