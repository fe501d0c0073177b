"""Every setting of a training run, written once: name, type, default, range, help, what it configures, and whether a
resumed run may change it.

Names are unique across the sections, so each setting is also a flag: ``--learning_rate 1e-4``. What else depends on
the settings follows from here: the flags, the table in the documentation, the options of the training loop, the fields
of the task, and what a resumed run may change.
"""
from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field
from typing import Any

from ms_diffsynth.config.setting import Setting
from ms_diffsynth.registry import OPTIMIZERS, TASKS


def _setting(default: Any, help: str, range: str = "", *, choices: tuple[str, ...] = (), has_commas: bool = False,
             is_flag_only: bool = False, may_change: bool = False, configures: str = "", holds: str = "") -> Any:
    """One setting.

    Args:
        range: is read as it is shown: "0 < lr <= 0.1".
        has_commas: a flag may list values with commas.
        is_flag_only: a file cannot set it.
        may_change: it shapes no number of a run, so a resumed run may have another value.
        holds: "path" for what must be one that the system can look at, "prompt" for what a text encoder reads.
        configures: "training" for an option of `training.options.TrainingOptions`, "task" for a field of a task.
    """
    return field(default=default, metadata={
        "help": help, "range": range, "choices": choices, "has_commas": has_commas, "is_flag_only": is_flag_only,
        "may_change": may_change, "configures": configures, "holds": holds})


def _place(help: str, **options: Any) -> Any:
    """Where files are: they are known by what they hold, so a resumed run may name another place."""
    return _setting(None, help, may_change=True, holds="path", **options)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What is trained, and from which weights."""

    family: str = _setting(MISSING, "model family, such as flux or toy")
    model_paths: str | None = _setting(None, "folder of a diffusers-format model, or a JSON list of paths",
                                       may_change=True)
    model_id_with_origin_paths: str | None = _setting(None, "owner/name:pattern of files on a hub, separated by commas",
                                                      may_change=True)
    tokenizer_path: str | None = _place("folder, or owner/name:tokenizer/; null = shipped or model's own")
    tokenizer_1_path: str | None = _place("folder, or owner/name:tokenizer/; null = shipped or model's own")
    tokenizer_2_path: str | None = _place("folder, or owner/name:tokenizer_2/; null = shipped or model's own")
    tokenizer_3_path: str | None = _place("folder, or owner/name:tokenizer_3/; null = shipped or model's own")
    lora_base_model: str | None = _setting("dit", "model that gets the LoRA, or several with commas; unused when "
                                           "trainable_models is set")
    adapter: str = _setting("lora", "what that model gets: lora, or dora (all settings lora_... are its own too)")
    lora_target_modules: str = _setting("", "layers that get a LoRA, with commas; empty = the family's own choice")
    lora_rank: int = _setting(16, "rank of the LoRA", "1 <= lora_rank <= 65536")
    lora_alpha: float | None = _setting(None, "the LoRA is scaled by lora_alpha / lora_rank; null = lora_rank",
                                        "0 < lora_alpha <= 1000000")
    lora_checkpoint: str | None = _setting(None, "LoRA file to start from", holds="path")
    expert: str | None = _setting(
        None, "noise levels that are trained on, of a network of Wan 2.2 that is given alone; null = all, or those of "
        "the expert that is trained, where both are given", choices=("high_noise", "low_noise"))
    preset_lora_path: str | None = _setting(None, "LoRA file added to the model before training, which learns the rest",
                                            holds="path")
    preset_lora_model: str | None = _setting(None, "model that gets it; null = the first lora_base_model")
    preset_lora_in_samples: bool = _setting(True, "sample images, also of sample --run, are made with it; false for an "
                                            "adapter that undoes a distillation while training", may_change=True)
    controlnet: str | None = _setting(None, "ControlNet, by which the network sees control images: a folder, "
                                      "owner/name: of one on a hub, or new = copies of the network's first blocks",
                                      holds="path")
    controlnet_layers: int | None = _setting(None, "blocks of a new ControlNet; null = 4 of FLUX.1's double blocks, 5 "
                                             "of Qwen-Image's", "0 <= controlnet_layers <= 1000")
    controlnet_single_layers: int | None = _setting(None, "single blocks of a new ControlNet of FLUX.1; null = 10",
                                                    "0 <= controlnet_single_layers <= 1000")
    weights: str | None = _place("file of weights to start from that full training saved; null = those of the model")
    trainable_models: str | None = _setting(None, "models trained in full, with commas, such as dit or vae.decoder")
    remove_prefix_in_ckpt: str | None = _setting("pipe.dit.", "taken off the names of saved weights", may_change=True)
    fp8_models: str | None = _setting(None, "frozen models whose linear layers are stored in 8 bits, with commas")
    use_gradient_checkpointing: bool = _setting(False, "compute blocks again in backward: less memory, more time")
    use_gradient_checkpointing_offload: bool = _setting(False, "also keep their inputs on the host; mode pynative")
    template_model_id_or_path: str | None = _setting(None, "folder of a template, or owner/name: of one on a hub",
                                                     holds="path")
    trust_template_code: bool = _setting(False, "run the template's model.py, which is code; a flag only",
                                         is_flag_only=True, may_change=True)
    trust_template_sha256: str | None = _setting(None, "run it only with this SHA-256; a flag only",
                                                 is_flag_only=True, may_change=True)
    fuse: tuple[str, ...] = _setting((), "units moved from the prepared half into the compiled step", has_commas=True)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The images."""

    dataset_base_path: str = _setting(MISSING, "folder of the training images", may_change=True, holds="path")
    dataset_metadata_path: str | None = _place("csv, json or jsonl that lists images and prompts")
    dataset_repeat: int = _setting(1, "how often an epoch shows each image", "1 <= dataset_repeat <= 1000000")
    dataset_folders: tuple[str, ...] = _setting(
        (), "folders inside dataset_base_path, with commas: only these are read, each with its own captions or "
        "metadata; cats=10 shows its images ten times in an epoch", has_commas=True)
    data_file_keys: str = _setting("image", "metadata columns that hold file names, separated by commas")
    image_column: str | None = _setting(None, "metadata column of the images; null = image or file_name",
                                        may_change=True)
    video_column: str | None = _setting(None, "metadata column of the videos, of families of videos; null = video or "
                                        "file_name. Rows without a video may name an image in image_column",
                                        may_change=True)
    caption_column: str | None = _setting(None, "metadata column of the prompts; null = prompt, text or caption; "
                                          "empty = none, and caption files are not read either", may_change=True)
    allow_outside_base: bool = _setting(False, "read files outside the data folder, to which links and paths lead: for "
                                        "metadata that you trust", may_change=True)
    extra_inputs: str | None = _setting(None, "further columns to train on, with commas: edit_image (reference images: "
                                       "one, a list, or none), control_image (one, or a list), control_mask (white "
                                       "where a hole is to be filled), input_image and end_image (first and last frame "
                                       "of a video), template_inputs")
    edit_folders: tuple[str, ...] = _setting(
        (), "folders inside dataset_base_path with reference images, with commas: an image's first reference has its "
        "file name in the first folder, its second in the second", has_commas=True)
    edit_max_pixels: int | None = _setting(None, "most pixels of a reference image, which keeps its own size below; "
                                           "null = 1048576", "256 <= edit_max_pixels <= 268435456")
    edit_template: str | None = _setting(
        None, "how the text encoder of Qwen-Image-Edit is shown references: first = as by the first model, plus = as "
        "by -2509 and -2511; null = as the model's files tell", choices=("first", "plus"))
    control_mode: int | None = _setting(None, "which kind of control images a union of ControlNets is told; null = 0",
                                        "0 <= control_mode <= 1000")
    instance_prompt: str | None = _setting(None, "prompt of every image that has none of its own, or an empty one",
                                           holds="prompt")
    trigger_word: str | None = _setting(None, "word that stands for what is learned: put in front of every prompt that "
                                        "does not have it and is not empty", holds="prompt")
    caption_dropout: float | None = _setting(None, "share of samples, drawn anew at each step, that are trained with "
                                             "an empty prompt: for guidance by two branches; null = none",
                                             "0 < caption_dropout <= 1", configures="training")
    class_base_path: str | None = _place("folder of the class images of prior preservation")
    class_metadata_path: str | None = _place("metadata of the class images")
    class_prompt: str | None = _setting(None, "prompt of every class image that has none of its own",
                                       holds="prompt")
    validation_share: float | None = _setting(None, "share of the images that is held out for the validation loss",
                                              "0 < validation_share <= 0.5")
    validation_base_path: str | None = _place("folder of other images for the validation loss")
    validation_metadata_path: str | None = _place("metadata of images for the validation loss; without "
                                                  "validation_base_path these lie in dataset_base_path")
    height: int | None = _setting(None, "height in pixels; null with width = dynamic resolution",
                                  "1 <= height <= 16384")
    width: int | None = _setting(None, "width in pixels; null with height = dynamic resolution", "1 <= width <= 16384")
    max_pixels: int | None = _setting(None, "most pixels of an image, height times width, in dynamic resolution; "
                                      "larger ones are shrunk; null = the model's own size, else 1048576",
                                      "1 <= max_pixels <= 268435456")
    buckets: int | None = _setting(None, "most sizes in dynamic resolution, each of which is a compilation; null = as "
                                   "few as keep images near their shapes, at most 8, and 1 with class images",
                                   "1 <= buckets <= 1000")
    num_frames: tuple[str, ...] = _setting(
        (), "frames of a video, or several lengths with commas, each a compilation: a video is trained at the longest "
        "that it has, an image at 1; of Wan 4n + 1; empty = the model's own", has_commas=True)
    fps: float | None = _setting(None, "frames a second at which videos are trained, whatever their own rate; null = "
                                 "the model's", "0.1 <= fps <= 240")
    clips: str = _setting("start", "what is taken of a longer video: its start, its middle, or all of it, a row for "
                          "each clip", choices=("start", "middle", "all"))
    clip_start: float = _setting(0.0, "seconds at the beginning of every video that are left out; a column start says "
                                 "it for one video", "0 <= clip_start <= 1000000")
    cache_dir: str | None = _place("folder of the cache of split training; null = none, but the output_path of "
                                   "task ...:data_process and the dataset_base_path of task ...:train")
    max_sequence_length: int | None = _setting(None, "text tokens a prompt is padded or cut to; null = the family's",
                                               "1 <= max_sequence_length <= 8192")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """What is minimised."""

    task: str = _setting("sft", "training task, or with :data_process or :train one stage of it",
                         choices=tuple(task + stage for stage in ("", ":data_process", ":train") for task in TASKS))
    distill_steps: int = _setting(4, "direct_distill: sampling steps of the student", "1 <= distill_steps <= 50",
                                  configures="task")
    weighting_scheme: str | None = _setting(
        None, "distribution and weight of the training sigmas; null = diffsynth for sft, none for dreambooth",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap", "diffsynth"), configures="task")
    logit_mean: float = _setting(0.0, "mean of logit_normal", "-1000 <= logit_mean <= 1000", configures="task")
    logit_std: float = _setting(1.0, "standard deviation of logit_normal", "0 < logit_std <= 1000", configures="task")
    mode_scale: float = _setting(1.29, "scale of mode", "-1000 <= mode_scale <= 1000", configures="task")
    guidance_scale: float | None = _setting(
        None, "guidance embedded in the network during training; null = 3.5 for dreambooth, 1 for sft",
        "0 <= guidance_scale <= 1000", configures="task")
    with_prior_preservation: bool = _setting(False, "also learn class images, so that the class is not forgotten",
                                             configures="task")
    prior_loss_weight: float = _setting(1.0, "weight of the loss of the class images",
                                        "0 <= prior_loss_weight <= 1000000",
                                        configures="task")
    prediction_type: str | None = _setting(
        None, "denoising diffusion: what the network learns to give; null = what its scheduler_config.json says",
        choices=("epsilon", "v_prediction", "sample"), configures="task")
    snr_gamma: float | None = _setting(None, "denoising diffusion: gamma of the min-SNR loss weights, such as 5; "
                                       "null = none", "0 < snr_gamma <= 1000000", configures="task")
    noise_offset: float = _setting(0.0, "denoising diffusion: standard deviation of what is added to the noise of each "
                                   "channel, such as 0.05", "0 <= noise_offset <= 1", configures="task")
    zero_terminal_snr: bool = _setting(False, "denoising diffusion: the last timestep is noise alone; for "
                                       "prediction_type=v_prediction", configures="task")
    random_flip: bool = _setting(False, "denoising diffusion, autoencoder: mirror images at random, anew at every step",
                                 configures="task")
    posterior: str | None = _setting(None, "what is taken of the VAE's posterior; null = mean for sft, sample for "
                                     "dreambooth, autoencoder and denoising diffusion", choices=("mean", "sample"),
                                     configures="task")
    mse_weight: float = _setting(2.0, "autoencoder: weight of the squared error; that of the absolute error is 1",
                                 "0 <= mse_weight <= 1000000", configures="task")
    perceptual_weight: float = _setting(0.15, "autoencoder: weight of the distance between features of "
                                        "EfficientNet-Lite0 (extra [eval]); 0 = none",
                                        "0 <= perceptual_weight <= 1000000", configures="task")
    kl_weight: float = _setting(3e-4, "autoencoder: weight of the posterior's KL divergence from a normal distribution",
                                "0 <= kl_weight <= 1000000", configures="task")
    crop_size: int | None = _setting(None, "autoencoder: sides in pixels of a square cut out of every image at random, "
                                     "anew at every step; null = whole images", "1 <= crop_size <= 16384",
                                     configures="task")


def _optimizer(default: Any, help: str, range: str = "", **options: Any) -> Any:
    return _setting(default, help, range, configures="training", **options)


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """How it is minimised."""

    optimizer: str = _optimizer("adamw", "how weights follow their gradients; see docs/reference/optimizers.md",
                                choices=tuple(OPTIMIZERS))
    optimizer_args: tuple[str, ...] = _optimizer((), "further arguments of the optimizer, with commas, such as "
                                                 "d_coef=2,safeguard_warmup=true of prodigy", has_commas=True)
    learning_rate: float = _optimizer(1e-4, "learning rate; above 0.1 only for prodigy, where it is a factor and 1 is "
                                      "advised", "0 < lr <= 10")
    weight_decay: float = _optimizer(0.01, "decoupled weight decay", "0 <= weight_decay <= 1")
    adam_beta1: float = _optimizer(0.9, "decay of the first moment, of optimizers that have beta1",
                                   "0 <= adam_beta1 < 1")
    adam_beta2: float = _optimizer(0.999, "decay of the second moment, of optimizers that have beta2",
                                   "0 <= adam_beta2 < 1")
    adam_epsilon: float = _optimizer(1e-8, "added to the root of the second moment, of optimizers that have epsilon",
                                     "1e-30 <= adam_epsilon <= 1")
    max_grad_norm: float | None = _optimizer(1.0, "gradients are scaled down to this norm; null = left as they are",
                                             "0 < max_grad_norm <= 1e+12")
    lr_scheduler: str = _optimizer("constant", "learning-rate schedule", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = _optimizer(0, "steps in which the learning rate rises from zero",
                                      "0 <= lr_warmup_steps <= 1000000000")
    gradient_accumulation_steps: int = _optimizer(1, "micro-steps to one step",
                                                  "1 <= gradient_accumulation_steps <= 1000000")
    use_ema: bool = _optimizer(False, "keep a moving average of the trained weights, for samples and a file of its own")
    ema_decay: float = _optimizer(0.9999, "decay of the moving average, after its warm-up", "0 <= ema_decay < 1")
    loss_scale: float = _optimizer(1.0, "constant factor on the loss in the backward pass, for float16",
                                   "1 <= loss_scale <= 3.4e+38")


def _run(default: Any, help: str, range: str = "", **options: Any) -> Any:
    """A setting of the training loop that shapes no number."""
    return _setting(default, help, range, may_change=True, configures="training", **options)


def _sample(default: Any, help: str, range: str = "", **options: Any) -> Any:
    """A setting of the sample images."""
    return _setting(default, help, range, may_change=True, **options)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where and how long."""

    mode: str = _setting("graph", "compiled or eager training step", choices=("graph", "pynative"))
    device: str | None = _setting(None, "null = an Ascend where there is one, else the CPU", choices=("CPU", "Ascend"))
    dtype: str | None = _setting(None, "dtype of the networks; null = what suits the device",
                                 choices=("float32", "bfloat16", "float16"))
    jit_level: str = _setting("O0", "how far MindSpore fuses operators of the compiled step on an Ascend: O1 fuses "
                              "chains of element-wise ones", choices=("O0", "O1"))
    device_memory: float | None = _setting(None, "most GiB of an Ascend's memory that MindSpore may take; null = all",
                                           "0 < device_memory <= 65536", may_change=True)
    seed: int = _setting(42, "seed of everything random", "0 <= seed < 4294967296", configures="training")
    batch_size: int = _setting(1, "images or videos in a micro-step, per device",
                               "1 <= batch_size <= 65536", configures="training")
    zero_stage: int = _run(0, "several devices: 1 divides the optimizer's moments among them, 2 the accumulated "
                           "gradients too", "0 <= zero_stage <= 2")
    num_epochs: int | None = _run(None, "end after this many epochs", "1 <= num_epochs <= 1000000000")
    max_train_steps: int | None = _run(None, "end after this many steps", "1 <= max_train_steps <= 1000000000")
    output_path: str = _setting("./models/train", "folder for checkpoints, samples and records", may_change=True,
                                holds="path")
    save_steps: int | None = _run(None, "save every N steps; null = after every epoch", "1 <= save_steps <= 1000000000")
    keep_saved: int | None = _run(None, "how many saves of weights to keep; null = all",
                                  "1 <= keep_saved <= 1000000000")
    sample_count: int = _sample(16, "how many sample images, of a family without prompts", "0 <= sample_count <= 65536")
    sample_steps: int | None = _run(None, "make sample images every N steps", "1 <= sample_steps <= 1000000000")
    sample_prompts: tuple[str | dict[str, Any], ...] = _sample(
        (), "prompts of the sample images, or mappings of prompt and its own negative_prompt, cfg_scale, guidance, "
        "seed, height, width, num_frames, num_inference_steps and sampler; as a flag one prompt or a JSON list",
        holds="prompt")
    sample_negative_prompt: str = _sample("", "what sample_cfg_scale leads the sample images away from", holds="prompt")
    sample_cfg_scale: float | None = _sample(None, "two-branch guidance of the sample images, 1 is off; null = the "
                                             "model's", "0 <= sample_cfg_scale <= 1000")
    sample_guidance: float | None = _sample(None, "guidance told to a guidance-distilled model for the sample images; "
                                            "null = the model's", "0 <= sample_guidance <= 1000")
    sample_template_inputs: str | None = _sample(None, "template inputs of the sample images: a JSON object for all, "
                                                 "or a JSON list of one each")
    sample_edit_images: tuple[str, ...] = _sample(
        (), "reference images of the sample images: a file for all prompts, or one for each, several of one joined by "
        "semicolons; empty = those of the first rows that have any", has_commas=True)
    sample_control_images: tuple[str, ...] = _sample(
        (), "control images of the sample images: a file for all prompts, or one for each, several of one joined by "
        "semicolons; empty = those of the first rows", has_commas=True)
    sample_control_masks: tuple[str, ...] = _sample(
        (), "masks of the sample images, white where the hole is: one for all, or one for each; empty = those of the "
        "first rows", has_commas=True)
    sample_seed: int = _sample(0, "seed of the sample images", "0 <= sample_seed < 4294967296")
    num_inference_steps: int = _sample(20, "sampling steps of the sample images", "1 <= num_inference_steps <= 1000")
    sampler: str | None = _sample(None, "of the sample images, one of the family's; null = its first")
    sample_height: int | None = _sample(None, "height of the sample images in pixels", "1 <= sample_height <= 16384")
    sample_width: int | None = _sample(None, "width of the sample images in pixels", "1 <= sample_width <= 16384")
    sample_num_frames: int | None = _sample(None, "frames of the sample videos; null = the longest of num_frames, else "
                                            "the model's", "1 <= sample_num_frames <= 100000")
    validation_steps: int | None = _run(None, "compute the validation loss before the first step, every N steps and "
                                        "at the end", "1 <= validation_steps <= 1000000000")
    evaluation_steps: int | None = _run(None, "compare sample images with real ones before the first step, every N "
                                        "steps and at the end (extra [eval])", "1 <= evaluation_steps <= 1000000000")
    evaluation_count: int = _run(64, "how many images are made for it", "4 <= evaluation_count <= 1000000")
    evaluation_reference: str | None = _run(None, "folder of the real images; null = dataset_base_path",
                                           holds="path")
    resume: str = _run("none", "auto = resume from the newest checkpoint in output_path, if there is one; none = "
                       "start; or the path of a checkpoint", holds="path")
    accept_changes: tuple[str, ...] = _run((), "what may differ from the run that saved the checkpoint, with commas, "
                                           "such as learning_rate,data", has_commas=True)
    checkpoint_steps: int | None = _run(None, "save all that is needed to resume every N steps; null = with every "
                                        "save of weights, 0 = never", "0 <= checkpoint_steps <= 1000000000")
    keep_checkpoints: int = _run(2, "how many of these to keep", "2 <= keep_checkpoints <= 1000000000")
    grace_seconds: float = _run(60.0, "most seconds from SIGTERM or SIGINT until the step is finished and saved",
                                "0 < grace_seconds <= 1000000")
    enable_tensorboard_log: bool = _setting(False, "the same as trackers=tensorboard", may_change=True)
    trackers: tuple[str, ...] = _setting((), "what also shows the run, with commas: tensorboard (extra [logging]), "
                                         "wandb (extra [wandb]), swanlab (extra [swanlab])", has_commas=True,
                                         may_change=True)
    tracker_project: str = _setting("ms_diffsynth", "project of the run in wandb and swanlab", may_change=True)
    push_to_hub: bool = _setting(False, "publish after every save, without holding up training", may_change=True)
    hub_model_id: str | None = _setting(None, "where: owner/name; made when it does not exist", may_change=True)
    hub_private_repo: bool = _setting(True, "only you may see it; a repository that is public is refused",
                                      may_change=True)
    hub: str = _setting("huggingface", "which hub: of models named owner/name:pattern, and of push_to_hub; the token "
                        "comes from its login or from the environment",
                        choices=("huggingface", "modelscope"), may_change=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: `load_config` makes one, `train` runs it."""

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection = RunSection()

    def flat(self) -> dict[str, Any]:
        """Every setting by its name."""
        return {name: getattr(getattr(self, setting.section), name) for name, setting in SETTINGS.items()}


# what an entry of sample_prompts may say besides its prompt -> the setting that it overrides
SAMPLE_OVERRIDES = {"negative_prompt": "sample_negative_prompt", "cfg_scale": "sample_cfg_scale",
                    "guidance": "sample_guidance", "seed": "sample_seed", "height": "sample_height",
                    "width": "sample_width", "num_frames": "sample_num_frames",
                    "num_inference_steps": "num_inference_steps", "sampler": "sampler"}


def prompts_of(entries: Iterable[str | dict[str, Any]]) -> list[str]:
    """The texts of ``sample_prompts``."""
    return [entry if isinstance(entry, str) else entry["prompt"] for entry in entries]


def flat(settings: Any) -> dict[str, Any]:
    """Every value of a `TrainConfig`, of a parsed command line, or of nothing, by its name."""
    if isinstance(settings, TrainConfig):
        return settings.flat()
    return dict(vars(settings)) if hasattr(settings, "__dict__") else {}


def _settings() -> Iterator[Setting]:
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            kinds = [k for k in typing.get_args(hints[item.name]) or (hints[item.name],) if k not in (type(None), ...)]
            kind = tuple if typing.get_origin(hints[item.name]) is tuple else kinds[0]
            yield Setting(name=item.name, section=section, kind=kind, default=item.default, metadata=item.metadata,
                          is_optional=type(None) in typing.get_args(hints[item.name]))


SECTIONS: dict[str, type] = typing.get_type_hints(TrainConfig)
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _settings()}
