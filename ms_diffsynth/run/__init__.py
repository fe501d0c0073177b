"""The builder of a run: from settings to pipeline, data sets, module, sampler and trainer."""
from ms_diffsynth.run.build import build_datasets, build_module, build_pipeline, build_sampler, build_task
from ms_diffsynth.run.task import launch_training_task, train

__all__ = ["build_datasets", "build_module", "build_pipeline", "build_sampler", "build_task", "launch_training_task",
           "train"]
