"""Train FLUX.2 from Python: a script to copy and change. Its flags are those of DiffSynth-Studio's scripts, and ours.

    ms-diffsynth tiny flux2 models/flux2-tiny
    python examples/flux2/model_training/train.py --model_paths models/flux2-tiny \
        --dataset_base_path examples/data/dreambooth_cat_fluent \
        --dataset_metadata_path examples/data/dreambooth_cat_fluent/metadata.csv \
        --height 128 --width 128 --learning_rate 2e-3 --num_epochs 8 --output_path runs/flux2-script

`ms-diffsynth train CONFIG.yaml` does the same from a file. `--help` lists every flag, with its default.
"""
from __future__ import annotations

import sys

from ms_diffsynth import (
    Accelerator,
    DiffusionTrainingModule,
    Flux2ImagePipeline,
    ModelLogger,
    build_datasets,
    build_sampler,
    compute_dtype,
    launch_data_process_task,
    launch_training_task,
    model_configs,
    run_main,
    template_settings,
    tokenizer_configs,
    training_mode,
    training_parser,
)


class Flux2TrainingModule(DiffusionTrainingModule):
    """What is trained, and what is minimised.

    As it stands, the training step is compiled. With a ``forward(self, data) -> loss`` of its own (which may call
    FlowMatchSFTLoss) the module is differentiated eagerly instead.
    """

    def __init__(self, args):
        super().__init__()
        self.pipe = Flux2ImagePipeline.from_pretrained(
            model_configs(args.model_paths, args.model_id_with_origin_paths),
            **tokenizer_configs(args, Flux2ImagePipeline),
            mindspore_dtype=compute_dtype(args.dtype),
        )
        self.pipe.max_sequence_length = args.max_sequence_length or 512
        self.fuse = args.fuse  # ("encode_image",) compiles the VAE into the step
        self.load_training_template_model(self.pipe, **template_settings(args))
        self.switch_pipe_to_training_mode(self.pipe, **training_mode(args))


def main():
    parser = training_parser("flux2", __doc__)  # add your own flags with parser.add_argument
    args = parser.parse_args()
    accelerator = Accelerator(args.gradient_accumulation_steps, args.mode, args.device, jit_level=args.jit_level,
                              device_memory=args.device_memory)
    dataset, class_dataset = build_datasets(args, Flux2ImagePipeline.division_factor)
    model = Flux2TrainingModule(args)
    model_logger = ModelLogger(args.output_path, args.remove_prefix_in_ckpt, args.enable_tensorboard_log)
    sampler, captions = build_sampler(args, model.pipe)
    # stage one of split training writes the cache that the task ...:train reads; every other task trains
    launch = launch_data_process_task if args.task.endswith(":data_process") else launch_training_task
    launch(accelerator, dataset, model, model_logger, class_dataset=class_dataset, args=args,
           sampler=sampler, sample_captions=captions)


if __name__ == "__main__":
    sys.exit(run_main(main))
