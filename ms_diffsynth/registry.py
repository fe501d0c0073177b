"""Family, task or optimizer by name -> where it is. One line each; it is imported when it is asked for."""
from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ms_diffsynth.errors import ConfigError, nearest
from ms_diffsynth.formats.interchange import Table, read_table
from ms_diffsynth.formats.json_text import read_json

if TYPE_CHECKING:
    from ms_diffsynth.pipeline import Family

FAMILIES = {
    "ddpm_unet": "ms_diffsynth.pipelines.ddpm_unet",
    "flux": "ms_diffsynth.pipelines.flux",
    "flux2": "ms_diffsynth.pipelines.flux2",
    "qwen_image": "ms_diffsynth.pipelines.qwen_image",
    "sd3": "ms_diffsynth.pipelines.sd3",
    "sdxl": "ms_diffsynth.pipelines.sdxl",
    "toy": "ms_diffsynth.pipelines.toy",
    "wan": "ms_diffsynth.pipelines.wan",
    "z_image": "ms_diffsynth.pipelines.z_image",
}


# ``_class_name`` in the model_index.json of a whole model -> its family
MODEL_CLASSES = {
    "DDPMPipeline": "ddpm_unet",
    "Flux2KleinPipeline": "flux2",
    "Flux2Pipeline": "flux2",
    "FluxControlNetPipeline": "flux",
    "FluxControlPipeline": "flux",
    "FluxFillPipeline": "flux",
    "FluxKontextPipeline": "flux",
    "FluxPipeline": "flux",
    "QwenImageControlNetInpaintPipeline": "qwen_image",
    "QwenImageControlNetPipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image",
    "QwenImageEditPlusPipeline": "qwen_image",
    "QwenImagePipeline": "qwen_image",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "ToyPipeline": "toy",
    "WanImageToVideoPipeline": "wan",
    "WanPipeline": "wan",
    "ZImagePipeline": "z_image",
}


class TaskEntry(NamedTuple):
    """Where a task is: ``module:class``; and the values of its fields that a run leaves open."""

    where: str
    defaults: Mapping[str, Any] = {}


# sft is DiffSynth-Studio's supervised script, dreambooth that of document 003; a family may have a task of its own
TASKS = {
    "sft": TaskEntry("ms_diffsynth.diffusion.units:Objective",
                     {"weighting_scheme": "diffsynth", "posterior": "mean", "guidance_scale": 1.0}),
    "dreambooth": TaskEntry("ms_diffsynth.diffusion.units:Objective",
                            {"weighting_scheme": "none", "posterior": "sample", "guidance_scale": 3.5}),
    "autoencoder": TaskEntry("ms_diffsynth.diffusion.autoencoder:Autoencoder"),
    "direct_distill": TaskEntry("ms_diffsynth.diffusion.distillation:DirectDistillation", {"guidance_scale": 1.0}),
}


class OptimizerEntry(NamedTuple):
    """Where an optimizer is: ``module:class``; and the highest learning rate that is not taken for a slip."""

    where: str
    highest_rate: float = 0.1


OPTIMIZERS = {
    "adafactor": OptimizerEntry("ms_diffsynth.training.optim.adafactor:Adafactor"),
    "adamw": OptimizerEntry("ms_diffsynth.training.optim.adamw:AdamW"),
    "came": OptimizerEntry("ms_diffsynth.training.optim.came:CAME"),
    "prodigy": OptimizerEntry("ms_diffsynth.training.optim.prodigy:Prodigy", highest_rate=10.0),
}


# what shows runs besides loss.csv and report.html
TRACKERS = {
    "swanlab": "ms_diffsynth.training.trackers:SwanLab",
    "tensorboard": "ms_diffsynth.training.trackers:TensorBoard",
    "wandb": "ms_diffsynth.training.trackers:Wandb",
}


def family(name: str) -> Family:
    """The family called ``name``.

    Raises: ConfigError naming the nearest family and all of them.
    """
    if name not in FAMILIES:
        raise ConfigError(f"family='{name}' is unknown: expected one of {', '.join(sorted(FAMILIES))}."
                          f"{nearest(name, FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILY


def family_of(folder: Path) -> str:
    """Name of the family of a whole model. Raises: ConfigError where its model_index.json tells none."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no model_index.json, which tells the family of a model: expected the folder "
                          "of a diffusers-format model. Say the family too: FAMILY MODEL.")
    class_name = read_json(file, ConfigError, "Download it again.").get("_class_name")
    if class_name not in MODEL_CLASSES:
        raise ConfigError(f"{file} describes a {class_name}: expected one of {', '.join(sorted(MODEL_CLASSES))}. Say "
                          "the family too, if it is one: FAMILY MODEL.")
    return MODEL_CLASSES[class_name]


def interchange(name: str) -> Table | None:
    """How others call the layers of a family's models; None where only this package has such models."""
    file = Path(__file__).parent.joinpath(*FAMILIES.get(name, name).split(".")[1:], "interchange.yaml")
    return read_table(file) if name in FAMILIES and file.is_file() else None


def interchange_tables() -> dict[str, Table]:
    """Family -> its table."""
    return {name: table for name in FAMILIES if (table := interchange(name)) is not None}


def entry(where: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
