"""Train Qwen-Image from Python: a script to copy and change. Its flags are DiffSynth-Studio's, and ours.

    ms-diffsynth tiny qwen_image models/qwen-image-tiny
    python examples/qwen_image/model_training/train.py --model_paths models/qwen-image-tiny \
        --dataset_base_path examples/data/dreambooth_cat_fluent \
        --dataset_metadata_path examples/data/dreambooth_cat_fluent/metadata.csv \
        --height 128 --width 128 --learning_rate 2e-3 --num_epochs 8 --output_path runs/qwen-script

`ms-diffsynth train CONFIG.yaml` does the same from a file. `--help` lists every flag, with its default.
"""
from __future__ import annotations

import sys

from ms_diffsynth import (
    Accelerator,
    DiffusionTrainingModule,
    ModelLogger,
    Objective,
    QwenImagePipeline,
    UnifiedDataset,
    buckets_near_square,
    compute_dtype,
    launch_data_process_task,
    launch_training_task,
    model_configs,
    run_main,
    tokenizer_configs,
    training_parser,
)


class QwenImageTrainingModule(DiffusionTrainingModule):
    """What is trained, and what is minimised.

    As it stands, the training step is compiled. With a ``forward(self, data) -> loss`` of its own (which may call
    FlowMatchSFTLoss) the module is differentiated eagerly instead.
    """

    def __init__(self, args):
        super().__init__()
        self.pipe = QwenImagePipeline.from_pretrained(
            model_configs(args.model_paths, args.model_id_with_origin_paths),
            **tokenizer_configs(args, QwenImagePipeline),
            mindspore_dtype=compute_dtype(args.dtype),
        )
        self.pipe.max_sequence_length = args.max_sequence_length or 1024
        default_scheme = "none" if args.task.startswith("dreambooth") else "diffsynth"
        self.fuse = args.fuse  # ("encode_image",) compiles the VAE into the step
        self.switch_pipe_to_training_mode(
            self.pipe,
            trainable_models=args.trainable_models,
            lora_base_model=None if args.trainable_models else args.lora_base_model,
            lora_target_modules=args.lora_target_modules,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_checkpoint=args.lora_checkpoint,
            task=args.task,
            fp8_models=args.fp8_models,
            use_gradient_checkpointing=args.use_gradient_checkpointing,
            use_gradient_checkpointing_offload=args.use_gradient_checkpointing_offload,
            objective=Objective(
                weighting_scheme=args.weighting_scheme or default_scheme,
                logit_mean=args.logit_mean,
                logit_std=args.logit_std,
                mode_scale=args.mode_scale,
                posterior=args.posterior,
                guidance_scale=args.guidance_scale,
                prior_loss_weight=args.prior_loss_weight if args.with_prior_preservation else None,
            ),
        )


def dataset(args, base_path, metadata_path, prompt, repeat=1):
    """Pictures and prompts; ``prompt`` serves every picture that has none of its own."""
    factor = QwenImagePipeline.division_factor
    buckets = None if args.height else buckets_near_square(args.max_pixels, factor, args.buckets)
    data = UnifiedDataset(
        base_path=base_path,
        metadata_path=metadata_path,
        repeat=repeat,
        data_file_keys=args.data_file_keys,
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path=base_path, max_pixels=args.max_pixels, height=args.height, width=args.width, buckets=buckets,
        ),
        captions=prompt is None,
        required="prompt" if prompt is None else (),
    )
    if prompt is not None:
        data.rows = [{"prompt": prompt} | row for row in data.rows]
    return data


def main():
    parser = training_parser("qwen_image", __doc__)
    args = parser.parse_args()
    accelerator = Accelerator(args.gradient_accumulation_steps, args.mode, args.device)
    pictures = dataset(
        args, args.dataset_base_path, args.dataset_metadata_path, args.instance_prompt, args.dataset_repeat)
    class_images = None
    if args.with_prior_preservation:
        class_images = dataset(args, args.class_base_path, args.class_metadata_path, args.class_prompt)
    model = QwenImageTrainingModule(args)
    model_logger = ModelLogger(args.output_path, args.remove_prefix_in_ckpt, args.enable_tensorboard_log)

    def sampler():
        """Sample pictures with the present weights, always from the same seeds."""
        return [
            model.pipe(prompt=prompt, height=args.sample_height or args.height or 512,
                       width=args.sample_width or args.width or 512, seed=args.sample_seed + k,
                       num_inference_steps=args.num_inference_steps)
            for k, prompt in enumerate(args.sample_prompts)
        ]

    if args.task.endswith(":data_process"):  # stage one of split training: the cache that sft:train reads
        launch_data_process_task(accelerator, pictures, model, model_logger, class_dataset=class_images, args=args)
        return
    launch_training_task(
        accelerator, pictures, model, model_logger, class_dataset=class_images, args=args,
        sampler=sampler if args.sample_prompts else None, sample_captions=list(args.sample_prompts),
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
