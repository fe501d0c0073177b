"""ms_diffsynth: training of diffusion models with MindSpore. Every public name is importable from here.

Names are imported when they are first used, so that ``import ms_diffsynth`` is instant and loads no framework.
"""
from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# MindSpore and transformers print warnings that no user of this package can act on; a value set outside wins
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"

_WHERE = {
    # units and programs
    "PipelineUnit": "units", "TensorUnit": "units", "Program": "program", "Cut": "program",
    # pipelines
    "Pipeline": "pipeline", "Family": "pipeline", "Component": "models", "ModelConfig": "hub.download",
    "FluxImagePipeline": "pipelines.flux.pipeline", "TrainStepForFluxDevDB": "pipelines.flux.train_step",
    "Flux2ImagePipeline": "pipelines.flux2.pipeline",
    "QwenImagePipeline": "pipelines.qwen_image.pipeline", "SD3ImagePipeline": "pipelines.sd3.pipeline",
    "UnconditionalImagePipeline": "pipelines.ddpm_unet.pipeline",
    "gradient_checkpoint_forward": "nn.recompute",
    # data
    "UnifiedDataset": "data.dataset",
    # training
    "Accelerator": "train.distributed", "DistributedDataParallelKwargs": "train.distributed",
    "DiffusionTrainingModule": "train.module", "FlowMatchSFTLoss": "train.losses", "Objective": "diffusion.units",
    "DDPMObjective": "diffusion.ddpm", "NoiseSchedule": "diffusion.ddpm",
    "ModelLogger": "train.logger", "Trainer": "train.trainer", "Hook": "train.hooks.contract",
    "launch_training_task": "run.training",
    "replay_training_step": "debug.replay",
    "launch_data_process_task": "train.two_stage",
    "TrainStep": "train.step", "AttrJitWrapper": "train.step", "AdamW": "train.optim", "LearningRate": "train.optim",
    "ShardedAdamW": "train.optim", "Sharded": "train.optim", "Prodigy": "train.optim.prodigy",
    "Adafactor": "train.optim.adafactor", "Optimizer": "train.optim", "OptimizerCell": "train.optim",
    "Draws": "draws",
    # evaluation
    "Evaluator": "evaluate.report", "Evaluation": "evaluate.report",
    # scripts
    "load_config": "config", "TrainConfig": "config", "train": "run.training", "build_pipeline": "run.build",
    "build_datasets": "run.build", "build_module": "run.build", "build_sampler": "run.build",
    "training_parser": "config.flags", "run_main": "cli.run_main", "compute_dtype": "runtime",
    # weights
    "load_state_dict": "formats.weights", "save_state_dict": "formats.weights", "save_lora": "formats.lora",
    "load_lora": "formats.lora",
    # templates
    "TemplatePipeline": "template.pipeline", "load_template_model": "template.loading",
    "attach_template": "template.units", "pack_template": "template.package", "no_grad": "template.loading",
    # errors
    "UserError": "errors", "ConfigError": "errors", "DataError": "errors", "WeightError": "errors",
    "CacheError": "errors", "TemplateError": "errors", "UntrustedCodeError": "errors",
}

__all__ = [*_WHERE, "StaticLossScaler"]


def __getattr__(name: str) -> Any:
    if name == "StaticLossScaler":
        from mindspore.amp import StaticLossScaler

        return StaticLossScaler
    if name not in _WHERE:
        raise AttributeError(f"module 'ms_diffsynth' has no attribute '{name}'")
    return getattr(import_module(f"ms_diffsynth.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
