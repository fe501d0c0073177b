"""Family or optimizer by name -> where it is. One line each; it is imported when it is asked for."""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ms_diffsynth.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ms_diffsynth.pipeline import Family


class FamilyEntry(NamedTuple):
    """Where a family is; and what settings are checked by before it is imported."""

    where: str
    takes_prompts: bool = True


FAMILIES = {
    "ddpm_unet": FamilyEntry("ms_diffsynth.pipelines.ddpm_unet", takes_prompts=False),
    "flux": FamilyEntry("ms_diffsynth.pipelines.flux"),
    "flux2": FamilyEntry("ms_diffsynth.pipelines.flux2"),
    "qwen_image": FamilyEntry("ms_diffsynth.pipelines.qwen_image"),
    "sd3": FamilyEntry("ms_diffsynth.pipelines.sd3"),
    "toy": FamilyEntry("ms_diffsynth.pipelines.toy"),
}


class OptimizerEntry(NamedTuple):
    """Where an optimizer is: ``module:class``; and the highest learning rate that is not taken for a slip."""

    where: str
    highest_rate: float = 0.1


OPTIMIZERS = {
    "adafactor": OptimizerEntry("ms_diffsynth.train.optim.adafactor:Adafactor"),
    "adamw": OptimizerEntry("ms_diffsynth.train.optim.adamw:AdamW"),
    "came": OptimizerEntry("ms_diffsynth.train.optim.came:CAME"),
    "prodigy": OptimizerEntry("ms_diffsynth.train.optim.prodigy:Prodigy", highest_rate=10.0),
}


def family(name: str) -> Family:
    """The family called ``name``.

    Raises: ConfigError naming the nearest family and all of them.
    """
    if name not in FAMILIES:
        raise ConfigError(f"family='{name}' is unknown: expected one of {', '.join(sorted(FAMILIES))}."
                          f"{nearest(name, FAMILIES)}")
    return import_module(FAMILIES[name].where).FAMILY


def takes_prompts(name: str) -> bool:
    """Whether what a family samples follows a prompt, without importing it; True for an unknown one."""
    return name not in FAMILIES or FAMILIES[name].takes_prompts
