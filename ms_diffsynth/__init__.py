"""ms_diffsynth: training of diffusion models with MindSpore. Every public name is importable from here.

Names are imported when they are first used, so that ``import ms_diffsynth`` is instant and loads no framework.
"""
from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# MindSpore and transformers print warnings that no user of this package can act on; a value set outside wins
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"


class _BeforeMindone:
    """Adapts mindone's networks to a CPU when mindone is imported; finds nothing itself."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "mindone":
            sys.meta_path.remove(_BeforeMindone)
            import_module("ms_diffsynth.ops").install_cpu_kernels()


if "mindone" not in sys.modules:
    sys.meta_path.insert(0, _BeforeMindone)

_WHERE = {  # module -> the public names in it
    "cli.run_main": ("run_main",),
    "config": ("TrainConfig", "load_config"),
    "config.flags": ("training_parser",),
    "data.dataset": ("UnifiedDataset",),
    "debug.replay": ("replay_training_step",),
    "diffusion.ddpm": ("DDPMObjective", "NoiseSchedule"),
    "diffusion.units": ("Objective",),
    "draws": ("Draws",),
    "errors": ("CacheError", "ConfigError", "DataError",
               "TemplateError", "UntrustedCodeError", "UserError", "WeightError"),
    "evaluate.report": ("Evaluation", "Evaluator"),
    "formats.lora": ("load_lora", "save_lora"),
    "formats.weights": ("load_state_dict", "save_state_dict"),
    "hub.download": ("ModelConfig",),
    "models": ("Component",),
    "nn.recompute": ("gradient_checkpoint_forward",),
    "pipeline": ("Family", "Pipeline"),
    "pipelines.ddpm_unet.pipeline": ("UnconditionalImagePipeline",),
    "pipelines.flux.pipeline": ("FluxImagePipeline",),
    "pipelines.flux.train_step": ("TrainStepForFluxDevDB",),
    "pipelines.flux2.pipeline": ("Flux2ImagePipeline",),
    "pipelines.qwen_image.pipeline": ("QwenImagePipeline",),
    "pipelines.sd3.pipeline": ("SD3ImagePipeline",),
    "pipelines.sdxl.pipeline": ("SDXLPipeline",),
    "pipelines.wan.pipeline": ("WanVideoPipeline",),
    "pipelines.z_image.pipeline": ("ZImagePipeline",),
    "program": ("Cut", "Program"),
    "run.build": ("build_datasets", "build_module"),
    "run.pipeline": ("build_pipeline",),
    "run.samples": ("build_sampler", "prompts_to_prepare"),
    "run.task": ("launch_training_task", "train"),
    "runtime": ("compute_dtype",),
    "template.loading": ("load_template_model", "no_grad"),
    "template.package": ("pack_template",),
    "template.pipeline": ("TemplatePipeline",),
    "template.units": ("attach_template",),
    "training.distributed": ("Accelerator", "DistributedDataParallelKwargs"),
    "training.hooks.contract": ("Hook",),
    "training.logger": ("ModelLogger",),
    "training.losses": ("FlowMatchSFTLoss",),
    "training.module": ("DiffusionTrainingModule",),
    "training.optim": ("AdamW", "LearningRate", "Optimizer", "OptimizerCell", "Sharded", "ShardedAdamW"),
    "training.optim.adafactor": ("Adafactor",),
    "training.optim.prodigy": ("Prodigy",),
    "training.step": ("AttrJitWrapper", "TrainStep"),
    "training.trainer": ("Trainer",),
    "training.two_stage": ("launch_data_process_task",),
    "units": ("PipelineUnit", "TensorUnit"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [*_MODULE_OF, "StaticLossScaler"]


if TYPE_CHECKING:  # the same names for type checkers; a test compares
    from mindspore.amp import StaticLossScaler as StaticLossScaler

    from ms_diffsynth.cli.run_main import run_main as run_main
    from ms_diffsynth.config import TrainConfig as TrainConfig, load_config as load_config
    from ms_diffsynth.config.flags import training_parser as training_parser
    from ms_diffsynth.data.dataset import UnifiedDataset as UnifiedDataset
    from ms_diffsynth.debug.replay import replay_training_step as replay_training_step
    from ms_diffsynth.diffusion.ddpm import DDPMObjective as DDPMObjective, NoiseSchedule as NoiseSchedule
    from ms_diffsynth.diffusion.units import Objective as Objective
    from ms_diffsynth.draws import Draws as Draws
    from ms_diffsynth.errors import (
        CacheError as CacheError,
        ConfigError as ConfigError,
        DataError as DataError,
        TemplateError as TemplateError,
        UntrustedCodeError as UntrustedCodeError,
        UserError as UserError,
        WeightError as WeightError,
    )
    from ms_diffsynth.evaluate.report import Evaluation as Evaluation, Evaluator as Evaluator
    from ms_diffsynth.formats.lora import load_lora as load_lora, save_lora as save_lora
    from ms_diffsynth.formats.weights import load_state_dict as load_state_dict, save_state_dict as save_state_dict
    from ms_diffsynth.hub.download import ModelConfig as ModelConfig
    from ms_diffsynth.models import Component as Component
    from ms_diffsynth.nn.recompute import gradient_checkpoint_forward as gradient_checkpoint_forward
    from ms_diffsynth.pipeline import Family as Family, Pipeline as Pipeline
    from ms_diffsynth.pipelines.ddpm_unet.pipeline import UnconditionalImagePipeline as UnconditionalImagePipeline
    from ms_diffsynth.pipelines.flux.pipeline import FluxImagePipeline as FluxImagePipeline
    from ms_diffsynth.pipelines.flux.train_step import TrainStepForFluxDevDB as TrainStepForFluxDevDB
    from ms_diffsynth.pipelines.flux2.pipeline import Flux2ImagePipeline as Flux2ImagePipeline
    from ms_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline as QwenImagePipeline
    from ms_diffsynth.pipelines.sd3.pipeline import SD3ImagePipeline as SD3ImagePipeline
    from ms_diffsynth.pipelines.sdxl.pipeline import SDXLPipeline as SDXLPipeline
    from ms_diffsynth.pipelines.wan.pipeline import WanVideoPipeline as WanVideoPipeline
    from ms_diffsynth.pipelines.z_image.pipeline import ZImagePipeline as ZImagePipeline
    from ms_diffsynth.program import Cut as Cut, Program as Program
    from ms_diffsynth.run.build import build_datasets as build_datasets, build_module as build_module
    from ms_diffsynth.run.pipeline import build_pipeline as build_pipeline
    from ms_diffsynth.run.samples import (
        build_sampler as build_sampler,
        prompts_to_prepare as prompts_to_prepare,
    )
    from ms_diffsynth.run.task import launch_training_task as launch_training_task, train as train
    from ms_diffsynth.runtime import compute_dtype as compute_dtype
    from ms_diffsynth.template.loading import load_template_model as load_template_model, no_grad as no_grad
    from ms_diffsynth.template.package import pack_template as pack_template
    from ms_diffsynth.template.pipeline import TemplatePipeline as TemplatePipeline
    from ms_diffsynth.template.units import attach_template as attach_template
    from ms_diffsynth.training.distributed import (
        Accelerator as Accelerator,
        DistributedDataParallelKwargs as DistributedDataParallelKwargs,
    )
    from ms_diffsynth.training.hooks.contract import Hook as Hook
    from ms_diffsynth.training.logger import ModelLogger as ModelLogger
    from ms_diffsynth.training.losses import FlowMatchSFTLoss as FlowMatchSFTLoss
    from ms_diffsynth.training.module import DiffusionTrainingModule as DiffusionTrainingModule
    from ms_diffsynth.training.optim import (
        AdamW as AdamW,
        LearningRate as LearningRate,
        Optimizer as Optimizer,
        OptimizerCell as OptimizerCell,
        Sharded as Sharded,
        ShardedAdamW as ShardedAdamW,
    )
    from ms_diffsynth.training.optim.adafactor import Adafactor as Adafactor
    from ms_diffsynth.training.optim.prodigy import Prodigy as Prodigy
    from ms_diffsynth.training.step import AttrJitWrapper as AttrJitWrapper, TrainStep as TrainStep
    from ms_diffsynth.training.trainer import Trainer as Trainer
    from ms_diffsynth.training.two_stage import launch_data_process_task as launch_data_process_task
    from ms_diffsynth.units import PipelineUnit as PipelineUnit, TensorUnit as TensorUnit


def __getattr__(name: str) -> Any:
    if name == "StaticLossScaler":
        from mindspore.amp import StaticLossScaler

        return StaticLossScaler
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ms_diffsynth' has no attribute '{name}'")
    return getattr(import_module(f"ms_diffsynth.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
