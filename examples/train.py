"""Train from Python: a script to copy and change. `ms-diffsynth train` does the same, with the same flags.

    ms-diffsynth tiny flux models/flux-tiny
    python examples/train.py examples/flux/tiny_dreambooth.yaml --learning_rate 2e-3 --output_path runs/flux-script

Without a file, every setting is a flag, as in DiffSynth-Studio's scripts: `--family flux --model_paths ...`.
`--help-all` lists all of them with their defaults. Under `msrun` or `ms-diffsynth launch` each process runs this
script.
"""
from __future__ import annotations

import sys

from ms_diffsynth import (
    Accelerator,
    DiffusionTrainingModule,
    Hook,
    ModelLogger,
    build_datasets,
    build_module,
    build_pipeline,
    build_sampler,
    launch_data_process_task,
    launch_training_task,
    prompts_to_prepare,
    run_main,
    training_parser,
)


class TrainingModule(DiffusionTrainingModule):
    """What is trained, and what is minimised.

    As it stands, rows are prepared once. A ``forward(self, data) -> loss`` of its own prepares each row at every use;
    the loss is compiled where that is FlowMatchSFTLoss, and otherwise differentiated operation by operation. Override
    ``get_pipeline_inputs(self, data)`` to read other columns.
    """


class Announce(Hook):
    """Something of your own between the steps."""

    def end(self, trainer):
        trainer.progress.say(f"{trainer.logger.num_steps} steps in {trainer.epoch + 1} epochs")


def main():
    parser = training_parser(description=__doc__)  # add your own flags with parser.add_argument
    config, _ = parser.parse_config()  # the second are your own flags
    accelerator = Accelerator.of(config.flat())
    dataset, class_dataset, validation_dataset = build_datasets(config)
    pipe = build_pipeline(config)
    module = build_module(config, pipe, module=TrainingModule())
    logger = ModelLogger(config.run.output_path, config.model.remove_prefix_in_ckpt, config.run.enable_tensorboard_log)
    if config.objective.task.endswith(":data_process"):  # stage one of split training writes what ...:train reads
        launch_data_process_task(accelerator, dataset, module, logger, class_dataset, args=config,
                                 validation_dataset=validation_dataset, prompts=prompts_to_prepare(config, pipe))
        return
    sampler, captions = build_sampler(config, pipe, dataset)
    launch_training_task(accelerator, dataset, module, logger, class_dataset=class_dataset, args=config,
                         validation_dataset=validation_dataset, sampler=sampler, sample_captions=captions,
                         hooks=[Announce()])


if __name__ == "__main__":
    sys.exit(run_main(main))
