"""The configuration of one training run: a YAML file of sections, overruled by flags, checked before anything loads.

Every setting is one field below, with its default, its range and its help. Names are unique across the sections, so
each is also a flag: ``--learning_rate 1e-4``. What is wrong is reported at once, with file, line and the nearest name.
"""
from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

import yaml

from ms_diffsynth.config.setting import Setting, Wrong, without_secrets
from ms_diffsynth.config.yaml_lines import Written, read_sections
from ms_diffsynth.errors import ConfigError, listing, nearest
from ms_diffsynth.redact import redact
from ms_diffsynth.registry import OPTIMIZERS, takes_prompts

TOKEN_FLAGS = ("hub_token", "token")  # known, so that they are refused before anybody repeats their value
NO_TOKEN = ("a token is never a flag and never a setting: it would stay in files, in the shell's history and in the "
            "list of processes. Log in with 'hf auth login', or set HF_TOKEN (for ModelScope: MODELSCOPE_API_TOKEN), "
            "and replace the token that was written here.")


EXTRA_INPUTS = ("edit_image", "template_inputs")


def _field(default: Any, help: str, range: str = "", choices: tuple[str, ...] = (), has_commas: bool = False,
           is_flag_only: bool = False) -> Any:
    """One setting. ``range`` is read as it is shown: "0 < lr <= 0.1". ``has_commas``: a flag may list with commas."""
    return field(default=default, metadata={"help": help, "range": range, "choices": choices, "has_commas": has_commas,
                                            "is_flag_only": is_flag_only})


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What is trained, and from which weights."""

    family: str = _field(MISSING, "model family, such as flux or toy")
    model_paths: str | None = _field(None, "folder of a diffusers-format model, or a JSON list of paths")
    model_id_with_origin_paths: str | None = _field(None, "owner/name:pattern of files on a hub, separated by commas")
    tokenizer_path: str | None = _field(None, "folder, or owner/name:tokenizer/; null = shipped or model's own")
    tokenizer_1_path: str | None = _field(None, "folder, or owner/name:tokenizer/; null = shipped or model's own")
    tokenizer_2_path: str | None = _field(None, "folder, or owner/name:tokenizer_2/; null = shipped or model's own")
    tokenizer_3_path: str | None = _field(None, "folder, or owner/name:tokenizer_3/; null = shipped or model's own")
    lora_base_model: str | None = _field("dit", "model that gets the LoRA; unused when trainable_models is set")
    adapter: str = _field("lora", "what that model gets: lora, or dora (all settings lora_... are its own too)")
    lora_target_modules: str = _field("", "layers that get a LoRA, with commas; empty = the family's own choice")
    lora_rank: int = _field(16, "rank of the LoRA", "1 <= lora_rank")
    lora_alpha: float | None = _field(None, "the LoRA is scaled by lora_alpha / lora_rank; null = lora_rank",
                                      "0 < lora_alpha")
    lora_checkpoint: str | None = _field(None, "LoRA file to start from")
    trainable_models: str | None = _field(None, "models trained in full, with commas, such as dit or vae.decoder")
    remove_prefix_in_ckpt: str | None = _field("pipe.dit.", "taken off the names of saved weights")
    fp8_models: str | None = _field(None, "frozen models whose linear layers are stored in 8 bits, with commas")
    use_gradient_checkpointing: bool = _field(False, "compute blocks again in backward: less memory, more time")
    use_gradient_checkpointing_offload: bool = _field(False, "also keep their inputs on the host; mode pynative")
    template_model_id_or_path: str | None = _field(None, "folder of a template, or owner/name: of one on a hub")
    trust_template_code: bool = _field(False, "run the template's model.py, which is code; a flag only",
                                       is_flag_only=True)
    trust_template_sha256: str | None = _field(None, "run it only with this SHA-256; a flag only", is_flag_only=True)
    fuse: tuple[str, ...] = _field((), "units moved from the prepared half into the compiled step", has_commas=True)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The pictures."""

    dataset_base_path: str = _field(MISSING, "folder of the training pictures")
    dataset_metadata_path: str | None = _field(None, "csv, json or jsonl that lists pictures and prompts")
    dataset_repeat: int = _field(1, "how often an epoch shows each picture", "1 <= dataset_repeat")
    data_file_keys: str = _field("image", "metadata columns that hold file names, separated by commas")
    extra_inputs: str | None = _field(None, "further columns to train on, with commas: edit_image, template_inputs")
    instance_prompt: str | None = _field(None, "prompt of every picture that has none of its own")
    class_base_path: str | None = _field(None, "folder of the class images of prior preservation")
    class_metadata_path: str | None = _field(None, "metadata of the class images")
    class_prompt: str | None = _field(None, "prompt of every class image that has none of its own")
    height: int | None = _field(None, "height in pixels; null with width = dynamic resolution", "1 <= height")
    width: int | None = _field(None, "width in pixels; null with height = dynamic resolution", "1 <= width")
    max_pixels: int = _field(1048576, "most pixels of a picture in dynamic resolution", "1 <= max_pixels")
    buckets: int = _field(1, "most aspect ratios in dynamic resolution; each one is one compilation", "1 <= buckets")
    cache_dir: str | None = _field(None, "folder of the cache of split training; null = none, but the output_path of "
                                   "task ...:data_process and the dataset_base_path of task ...:train")
    max_sequence_length: int | None = _field(None, "text tokens a prompt is padded or cut to; null = the family's",
                                             "1 <= max_sequence_length")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """What is minimised."""

    task: str = _field("sft", "training objective, or with :data_process or :train one stage of it", choices=(
        "sft", "dreambooth", "direct_distill", "sft:data_process", "sft:train", "dreambooth:data_process",
        "dreambooth:train", "direct_distill:data_process", "direct_distill:train"))
    distill_steps: int = _field(4, "direct_distill: sampling steps of the student", "1 <= distill_steps <= 50")
    weighting_scheme: str | None = _field(
        None, "distribution and weight of the training sigmas; null = diffsynth for sft, none for dreambooth",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap", "diffsynth"))
    logit_mean: float = _field(0.0, "mean of logit_normal")
    logit_std: float = _field(1.0, "standard deviation of logit_normal", "0 < logit_std")
    mode_scale: float = _field(1.29, "scale of mode")
    guidance_scale: float | None = _field(None, "guidance embedded in the network during training; null = 3.5 for "
                                          "dreambooth, 1 for sft", "0 <= guidance_scale")
    with_prior_preservation: bool = _field(False, "also learn class images, so that the class is not forgotten")
    prior_loss_weight: float = _field(1.0, "weight of the loss of the class images", "0 <= prior_loss_weight")
    prediction_type: str | None = _field(
        None, "denoising diffusion: what the network learns to give; null = what its scheduler_config.json says",
        choices=("epsilon", "v_prediction", "sample"))
    snr_gamma: float | None = _field(None, "denoising diffusion: gamma of the min-SNR loss weights, such as 5; null = "
                                     "none", "0 < snr_gamma")
    random_flip: bool = _field(False, "denoising diffusion: mirror images at random, anew at every step")
    posterior: str | None = _field(None, "what is taken of the VAE's posterior; null = sample for dreambooth, mean "
                                   "for sft", choices=("mean", "sample"))


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """How it is minimised."""

    optimizer: str = _field("adamw", "how weights follow their gradients; see docs/optimizers.md",
                            choices=tuple(OPTIMIZERS))
    optimizer_args: tuple[str, ...] = _field((), "further arguments of the optimizer, with commas, such as "
                                             "d_coef=2,safeguard_warmup=true of prodigy", has_commas=True)
    learning_rate: float = _field(1e-4, "learning rate; above 0.1 only for prodigy, where it is a factor and 1 is "
                                  "advised", "0 < lr <= 10")
    weight_decay: float = _field(0.01, "decoupled weight decay", "0 <= weight_decay <= 1")
    adam_beta1: float = _field(0.9, "decay of the first moment, of optimizers that have beta1", "0 <= adam_beta1 < 1")
    adam_beta2: float = _field(0.999, "decay of the second moment, of optimizers that have beta2",
                               "0 <= adam_beta2 < 1")
    adam_epsilon: float = _field(1e-8, "added to the root of the second moment, of optimizers that have epsilon",
                                 "0 < adam_epsilon <= 1")
    max_grad_norm: float | None = _field(1.0, "gradients are scaled down to this norm; null = left as they are",
                                         "0 < max_grad_norm")
    lr_scheduler: str = _field("constant", "course of the learning rate", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = _field(0, "steps in which the learning rate rises from zero", "0 <= lr_warmup_steps")
    gradient_accumulation_steps: int = _field(1, "micro-steps to one step", "1 <= gradient_accumulation_steps")
    use_ema: bool = _field(False, "keep a moving average of the trained weights, for samples and a file of its own")
    ema_decay: float = _field(0.9999, "decay of the moving average, after its warm-up", "0 <= ema_decay < 1")
    loss_scale: float = _field(1.0, "constant factor on the loss in the backward pass, for float16", "1 <= loss_scale")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where and how long."""

    mode: str = _field("graph", "compiled or eager training step", choices=("graph", "pynative"))
    device: str | None = _field(None, "null = an Ascend where there is one, else the CPU", choices=("CPU", "Ascend"))
    dtype: str | None = _field(None, "dtype of the networks; null = what suits the device",
                               choices=("float32", "bfloat16", "float16"))
    jit_level: str = _field("O0", "how far MindSpore fuses operators of the compiled step on an Ascend: O1 fuses "
                            "chains of element-wise ones", choices=("O0", "O1"))
    device_memory: float | None = _field(None, "most GiB of an Ascend's memory that MindSpore may take; null = all",
                                         "0 < device_memory")
    seed: int = _field(42, "seed of everything random", "0 <= seed < 4294967296")
    batch_size: int = _field(1, "pictures in a micro-step, per device", "1 <= batch_size")
    zero_stage: int = _field(0, "several devices: 1 divides the optimizer's moments among them, 2 the accumulated "
                             "gradients too", "0 <= zero_stage <= 2")
    num_epochs: int | None = _field(None, "end after so many epochs", "1 <= num_epochs")
    max_train_steps: int | None = _field(None, "end after so many steps", "1 <= max_train_steps")
    output_path: str = _field("./models/train", "folder for checkpoints, samples and records")
    save_steps: int | None = _field(None, "save every so many steps; null = after every epoch", "1 <= save_steps")
    sample_count: int = _field(16, "how many sample images, of a family without prompts", "0 <= sample_count")
    sample_steps: int | None = _field(None, "make sample pictures every so many steps", "1 <= sample_steps")
    sample_prompts: tuple[str, ...] = _field((), "prompts of the sample pictures; as a flag one prompt or a JSON list")
    sample_template_inputs: str | None = _field(None, "template inputs of the sample pictures: a JSON object for all, "
                                                "or a JSON list of one each")
    sample_seed: int = _field(0, "seed of the sample pictures", "0 <= sample_seed < 4294967296")
    num_inference_steps: int = _field(20, "sampling steps of the sample pictures", "1 <= num_inference_steps")
    sampler: str | None = _field(None, "of the sample images, one of the family's; null = its first")
    sample_height: int | None = _field(None, "height of the sample pictures in pixels", "1 <= sample_height")
    sample_width: int | None = _field(None, "width of the sample pictures in pixels", "1 <= sample_width")
    evaluation_steps: int | None = _field(None, "compare sample pictures with real ones before the first step, every "
                                          "so many steps and at the end (extra [eval])", "1 <= evaluation_steps")
    evaluation_count: int = _field(64, "how many pictures are made for it", "4 <= evaluation_count")
    evaluation_reference: str | None = _field(None, "folder of the real pictures; null = dataset_base_path")
    resume: str = _field("none", "auto = go on from the newest checkpoint in output_path, if there is one; none = "
                         "start; or the path of a checkpoint")
    accept_changes: tuple[str, ...] = _field((), "what may differ from the run that saved the checkpoint, with commas, "
                                             "such as learning_rate,data", has_commas=True)
    checkpoint_steps: int | None = _field(None, "save all that a run needs to go on every so many steps; null = with "
                                          "every save of weights, 0 = never", "0 <= checkpoint_steps")
    keep_checkpoints: int = _field(2, "how many of these to keep", "2 <= keep_checkpoints")
    grace_seconds: float = _field(60.0, "most seconds from SIGTERM or SIGINT until the step is finished and saved",
                                  "0 < grace_seconds")
    enable_tensorboard_log: bool = _field(False, "also write TensorBoard events")
    push_to_hub: bool = _field(False, "publish after every save, without holding up training")
    hub_model_id: str | None = _field(None, "where: owner/name; made when it does not exist")
    hub_private_repo: bool = _field(True, "only you may see it; a repository that is public is refused")
    hub: str = _field("huggingface", "which hub; the token comes from its login or from the environment",
                      choices=("huggingface", "modelscope"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection = RunSection()

    def flat(self) -> dict[str, Any]:
        """Every setting by its name."""
        return {name: getattr(getattr(self, setting.section), name) for name, setting in SETTINGS.items()}

    def validate(self) -> TrainConfig:
        """Check ranges and what settings mean together. Raises: ConfigError listing everything that is wrong."""
        values = self.flat()
        problems = [f"{name}={value}: {expected}." for name, value in values.items()
                    if value is not None and (expected := SETTINGS[name].expected(value))]
        problems += [text for condition, text in _rules(self) if condition]
        _raise(problems)
        return self


def _rules(c: TrainConfig) -> Iterator[tuple[bool, str]]:
    """(is it wrong, what to say) for every combination of settings that cannot be meant."""
    prior = c.objective.with_prior_preservation
    kind, _, stage = c.objective.task.partition(":")
    yield (c.run.num_epochs is None and c.run.max_train_steps is None and stage != "data_process",
           "neither num_epochs nor max_train_steps is set: say how long to train, for example --num_epochs 1.")
    yield (not c.model.trainable_models and not c.model.lora_base_model,
           "neither lora_base_model nor trainable_models is set: say what to train, for example --lora_base_model dit.")
    for section, one, other in (("data", "height", "width"), ("run", "sample_height", "sample_width")):
        given = [getattr(getattr(c, section), name) is not None for name in (one, other)]
        yield given[0] != given[1], f"only one of {one} and {other} is set: set both, or neither."
    yield (c.data.height is not None and c.data.buckets > 1,
           f"buckets={c.data.buckets} with a fixed height and width: remove these for dynamic resolution, or buckets.")
    yield (prior and c.data.class_base_path is None,
           "with_prior_preservation=true without class_base_path: name the folder of the class images.")
    yield (prior and c.data.class_prompt is None and c.data.class_metadata_path is None,
           "with_prior_preservation=true without class_prompt: give it, or class_metadata_path with a prompt column.")
    yield (prior and kind != "dreambooth",
           f"with_prior_preservation=true with task={c.objective.task}: expected task=dreambooth.")
    unused = [n for n in ("class_base_path", "class_metadata_path", "class_prompt") if getattr(c.data, n) is not None]
    yield (bool(unused) and not prior,
           f"{listing(unused)} would not be used: set with_prior_preservation=true, or remove it.")
    yield (kind == "dreambooth" and not c.data.instance_prompt and not c.data.dataset_metadata_path
           and stage != "train",
           "task=dreambooth without instance_prompt: give it, or dataset_metadata_path with a prompt column.")
    yield (c.model.trainable_models is not None and c.model.lora_checkpoint is not None,
           f"lora_checkpoint={c.model.lora_checkpoint} with trainable_models, which trains no LoRA: remove one.")
    yield (c.model.trainable_models is not None and c.model.adapter != SETTINGS["adapter"].default,
           f"adapter={c.model.adapter} with trainable_models, which trains no adapter: remove one.")
    extra = [n.strip() for n in (c.data.extra_inputs or "").split(",") if n.strip()]
    odd = [name for name in extra if name not in EXTRA_INPUTS]
    yield (bool(odd), f"extra_inputs names {', '.join(map(repr, odd))}: expected some of {', '.join(EXTRA_INPUTS)}."
           f"{nearest(odd[0], EXTRA_INPUTS) if odd else ''}")
    yield (c.model.template_model_id_or_path is not None and "template_inputs" not in extra,
           f"template_model_id_or_path={c.model.template_model_id_or_path} without its input: set "
           "extra_inputs=template_inputs.")
    yield (c.model.template_model_id_or_path is None and "template_inputs" in extra,
           "extra_inputs names template_inputs without a template: set template_model_id_or_path.")
    rate, highest = c.optimizer.learning_rate, OPTIMIZERS["adamw"].highest_rate
    if c.optimizer.optimizer in OPTIMIZERS:
        highest = OPTIMIZERS[c.optimizer.optimizer].highest_rate
    yield (rate > highest,
           f"learning_rate={rate}: expected 0 < lr <= {highest} for optimizer={c.optimizer.optimizer}.")
    limit = c.run.max_train_steps
    yield (limit is not None and c.optimizer.lr_warmup_steps > limit,
           f"lr_warmup_steps={c.optimizer.lr_warmup_steps} exceeds max_train_steps={limit}: warm up for fewer steps.")
    yield from _rules_of_the_run(c, stage)


def _rules_of_the_run(c: TrainConfig, stage: str) -> Iterator[tuple[bool, str]]:
    """The same for pictures made on the way, publishing and going on."""
    yield (c.run.sample_template_inputs is not None and c.model.template_model_id_or_path is None,
           "sample_template_inputs without a template: set template_model_id_or_path, or remove it.")
    yield (c.run.sample_steps is not None and not c.run.sample_prompts and takes_prompts(c.model.family),
           f"sample_steps={c.run.sample_steps} without sample_prompts: say what to make pictures of.")
    yield (c.run.evaluation_steps is not None and stage != "",
           f"evaluation_steps={c.run.evaluation_steps} with task={c.objective.task}, which makes no pictures: evaluate "
           "afterwards, with ms-diffsynth sample and ms-diffsynth evaluate.")
    yield (c.run.evaluation_steps is not None and not c.run.sample_prompts and takes_prompts(c.model.family),
           f"evaluation_steps={c.run.evaluation_steps} without sample_prompts: say what to make pictures of.")
    yield (c.model.use_gradient_checkpointing_offload and c.run.mode == "graph",
           "use_gradient_checkpointing_offload=true in mode graph: MindSpore cannot move what a compiled step keeps to "
           "the host. Expected --mode pynative, or use_gradient_checkpointing without offload.")
    yield (c.run.push_to_hub and not c.run.hub_model_id,
           "push_to_hub=true without hub_model_id: say where, for example --hub_model_id me/my-lora.")
    yield (c.run.push_to_hub and stage == "data_process",
           f"push_to_hub=true with task={c.objective.task}, which trains nothing to publish: remove it.")
    unsent = [n for n in ("hub_model_id", "hub_private_repo", "hub") if getattr(c.run, n) != SETTINGS[n].default]
    yield bool(unsent) and not c.run.push_to_hub, f"{listing(unsent)} would not be used: set push_to_hub=true."
    yield (c.run.resume not in ("none", "auto") and stage == "data_process",
           f"resume={c.run.resume} with task={c.objective.task}: remove it; a cache is gone on with in any case.")
    yield (bool(c.run.accept_changes) and c.run.resume == "none",
           f"accept_changes={','.join(c.run.accept_changes)} would not be used: set resume, for example --resume auto.")


# -- the settings by name ----------------------------------------------------------------------------------------------


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


# -- the file -------------------------------------------------------------------------------------------------------


def load_config(path: str | os.PathLike[str] | None = None, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """The configuration of a YAML file, overruled by flags (name -> text), checked.

    Raises: ConfigError listing every unknown, misplaced, repeated, mistyped, impossible and missing setting.
    """
    problems: list[str] = []
    given = {} if path is None else _read(path, problems.append)
    for name, text in (overrides or {}).items():
        if name in SETTINGS:
            given[name] = Written(text=text, place=f"from the flag --{name}")
        else:
            problems.append(f"--{name} is no flag.{nearest(name, SETTINGS)}")
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, setting in SETTINGS.items():
        if name in given:
            try:
                values[setting.section][name] = setting.parse(given[name])
            except Wrong as error:
                problems.append(f"{name}={given[name]} {given[name].place}: {error}")
        elif setting.default is MISSING:
            problems.append(f"{name} is not set ({setting.metadata['help']}): set it in section '{setting.section}' of "
                            f"the configuration, or by --{name}.")
    _raise(problems)
    return TrainConfig(**{section: cls(**values[section]) for section, cls in SECTIONS.items()}).validate()


def _read(path: str | os.PathLike[str], report: Callable[[str], None]) -> dict[str, Written]:
    """Name -> what a file says; what is no setting of its section goes to ``report``."""
    given: dict[str, Written] = {}
    for section, name, written in read_sections(path, SECTIONS, report):
        if section is None and name in SECTIONS:
            report(f"{name} {written.place}: expected the settings of the section '{name}' below it.")
        elif name in TOKEN_FLAGS:
            report(f"{name} {written.place}: {NO_TOKEN}")
        elif name not in SETTINGS:
            report(f"{name} {written.place} is no setting.{nearest(name, SETTINGS)}")
        elif SETTINGS[name].section != section:
            report(f"{name} {written.place}: it belongs into section '{SETTINGS[name].section}'.")
        elif SETTINGS[name].metadata["is_flag_only"]:
            report(f"{name} {written.place}: a file cannot vouch for code. Pass --{name} when you start the run.")
        else:
            given[name] = written
    return given


def _raise(problems: list[str]) -> None:
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems)} settings are wrong:\n  "
        raise ConfigError(redact(head + "\n  ".join(p if p.endswith((".", "?")) else p + "." for p in problems)))


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as a file that `load_config` reads back to the same, but for what is a flag only, and
    for secrets."""
    sections = {name: {k: list(v) if isinstance(v, tuple) else v for k, v in vars(getattr(config, name)).items()
                       if not SETTINGS[k].metadata["is_flag_only"]} for name in SECTIONS}
    return yaml.safe_dump(without_secrets(sections), sort_keys=False, allow_unicode=True, width=math.inf)
