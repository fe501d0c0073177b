"""One training run from a configuration: pipeline, data, module, logger, sampler, loop."""
from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.config import TrainConfig, to_yaml
from ms_diffsynth.data.buckets import Bucket, make_buckets
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.operators import DataProcessingOperator, describe
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, listing
from ms_diffsynth.io.files import write_file
from ms_diffsynth.io.hub import ModelConfig, parse_model_id_with_origin_paths, parse_path_or_model_id
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import family
from ms_diffsynth.train.distributed import Accelerator
from ms_diffsynth.train.draws import Draws
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.loop import launch_training_task
from ms_diffsynth.train.module import DiffusionTrainingModule
from ms_diffsynth.train.prepared import CachedRows
from ms_diffsynth.train.split import launch_data_process_task, open_cache, stage_of

SCHEMES = {"sft": "diffsynth", "dreambooth": "none"}  # each objective's own weighting_scheme


def run(config: TrainConfig) -> ModelLogger:
    """Train as configured. Nothing is written before data, settings and weights are known to be sound."""
    stage, cache_dir = stage_of(config.objective.task), config.data.cache_dir
    accelerator = Accelerator(config.optimizer.gradient_accumulation_steps, config.run.mode, config.run.device)
    factor = family(config.model.family).pipeline.division_factor
    sets = (None, None) if stage == "train" else build_datasets(config, factor)
    pipe = build_pipeline(config)
    records = ModelLogger(config.run.output_path, config.model.remove_prefix_in_ckpt, config.run.enable_tensorboard_log)
    records.metadata = {"ms_diffsynth.family": config.model.family}
    if stage == "data_process" or (cache_dir and not stage):
        _process_data(config, pipe, accelerator, records, sets)
    if stage == "data_process":
        return records
    module = build_module(config, pipe)
    cut = module.training_cut()
    if stage == "train" or cache_dir:
        pictures = {name: operators(config, base, factor) for name, base in _bases(config).items()}
        sets = open_cache(cache_dir or config.data.dataset_base_path, module, cut, pictures, config.data.dataset_repeat)
    else:
        pipe.load_models_to_device(cut.models("prepare"))
    pipe.load_models_to_device(cut.models("step"))
    _write_config(config, accelerator, records, sets)
    options = {**vars(config.optimizer), "batch_size": config.run.batch_size, "num_epochs": config.run.num_epochs,
               "max_train_steps": config.run.max_train_steps, "seed": config.run.seed,
               "save_steps": config.run.save_steps, "sample_steps": config.run.sample_steps}
    sampler, captions = build_sampler(config, pipe) if stage != "train" else (None, [])
    return launch_training_task(accelerator, sets[0], module, records, **options, class_dataset=sets[1],
                                sampler=sampler, sample_captions=captions, settings=config.flat())


def _process_data(config: TrainConfig, pipe: Pipeline, accelerator: Accelerator, records: ModelLogger,
                  sets: tuple[UnifiedDataset, UnifiedDataset | None]) -> None:
    """Stage one; afterwards its models are let go, so that both stages never are in memory together."""
    kind = config.objective.task.partition(":")[0]
    module = build_module(config, pipe, f"{kind}:data_process")
    launch_data_process_task(accelerator, sets[0], module, records, sets[1], config.data.cache_dir)
    pipe.models.clear()


def _write_config(config: TrainConfig, accelerator: Accelerator, records: ModelLogger, sets: tuple[Any, Any]) -> None:
    if accelerator.is_main_process:
        records.output_path.mkdir(parents=True, exist_ok=True)
        write_file(records.output_path / "config.yaml", to_yaml(config).encode())
        sys.stderr.write(_summary(config, *sets))
        if stage_of(config.objective.task) == "train" and config.run.sample_prompts:
            sys.stderr.write("sample pictures need the models that this stage does not load: make them afterwards with "
                             "ms-diffsynth sample\n")


# -- data ----------------------------------------------------------------------------------------------------------


def build_datasets(config: TrainConfig, factor: int) -> tuple[UnifiedDataset, UnifiedDataset | None]:
    """The training pictures, and the class images when prior preservation is on."""
    data = config.data
    instance = _dataset(config, data.dataset_base_path, data.dataset_metadata_path, data.instance_prompt,
                        data.dataset_repeat, factor)
    if not config.objective.with_prior_preservation:
        return instance, None
    return instance, _dataset(config, data.class_base_path, data.class_metadata_path, data.class_prompt, 1, factor)


def _dataset(config: TrainConfig, base: str, metadata: str | None, prompt: str | None, repeat: int,
             factor: int) -> UnifiedDataset:
    data, operator = config.data, _operator(config, base, factor)
    dataset = UnifiedDataset(base_path=base, metadata_path=metadata, repeat=repeat, data_file_keys=data.data_file_keys,
                             main_data_operator=operator, captions=prompt is None,
                             required=() if prompt is not None else ("prompt",))
    if prompt is not None:
        dataset.rows = [{"prompt": prompt} | row for row in dataset.rows]
    return dataset


def _operator(config: TrainConfig, base: str, factor: int) -> DataProcessingOperator:
    data = config.data
    return UnifiedDataset.default_image_operator(
        base_path=base, max_pixels=data.max_pixels, height=data.height, width=data.width,
        height_division_factor=factor, width_division_factor=factor,
        buckets=None if data.height else buckets_near_square(data.max_pixels, factor, data.buckets))


def operators(config: TrainConfig, base: str, factor: int) -> dict[str, Any]:
    """What the configured data sets do to their pictures, without looking at any; see `UnifiedDataset.operators`."""
    columns = [key.strip() for key in config.data.data_file_keys.split(",")]
    return dict.fromkeys(columns, describe(_operator(config, base, factor)))


def _bases(config: TrainConfig) -> dict[str, str]:
    """Data set name -> its folder, for the data sets that are configured."""
    prior = {"class": config.data.class_base_path or ""} if config.objective.with_prior_preservation else {}
    return {"instance": config.data.dataset_base_path or ""} | prior


def buckets_near_square(max_pixels: int, factor: int, count: int) -> list[Bucket]:
    """The ``count`` buckets of at most ``max_pixels`` pixels whose shape is nearest to a square."""
    return sorted(make_buckets(max_pixels, factor), key=lambda b: abs(np.log(b.width / b.height)))[:count]


# -- model ---------------------------------------------------------------------------------------------------------


def model_configs(model_paths: str | None, model_id_with_origin_paths: str | None) -> list[ModelConfig]:
    """The files of the settings ``model_paths`` (a path, or a JSON list) and ``model_id_with_origin_paths``.

    Raises: ConfigError when neither names anything.
    """
    paths: list[Any] = []
    if model_paths:
        try:
            paths = json.loads(model_paths) if model_paths.lstrip().startswith("[") else [model_paths]
        except ValueError as error:
            raise ConfigError(f"model_paths={model_paths} is no JSON ({error}): expected a path, or a JSON list of "
                              "paths.") from None
    configs = [ModelConfig(path) for path in paths]
    if model_id_with_origin_paths:
        configs += parse_model_id_with_origin_paths(model_id_with_origin_paths)
    if not configs:
        raise ConfigError("neither model_paths nor model_id_with_origin_paths is set: name the folder of a "
                          "diffusers-format model, or files on a hub.")
    return configs


def tokenizer_configs(settings: Any, pipeline: type[Pipeline]) -> dict[str, ModelConfig]:
    """The ``tokenizer..._config`` arguments of ``from_pretrained`` that the ``tokenizer..._path`` settings name.

    Raises: ConfigError for a tokenizer the pipeline does not have.
    """
    own = [c.name for c in pipeline.components if c.name.startswith("tokenizer")]
    found = {}
    for name in ("tokenizer", "tokenizer_1", "tokenizer_2"):
        if text := getattr(settings, f"{name}_path"):
            if name not in own:
                raise ConfigError(f"{name}_path={text}: {pipeline.__name__} has no {name}; it has "
                                  f"{listing(own) or 'none at all'}. Remove the setting.")
            found[f"{name}_config"] = parse_path_or_model_id(text)
    return found


def build_pipeline(config: TrainConfig) -> Pipeline:
    """The family's pipeline on the configured weights."""
    model, cls = config.model, family(config.model.family).pipeline
    pipe = cls.from_pretrained(model_configs(model.model_paths, model.model_id_with_origin_paths),
                               **tokenizer_configs(model, cls), device=config.run.device,
                               mindspore_dtype=runtime.compute_dtype(config.run.dtype))
    if config.data.max_sequence_length is not None:
        if not hasattr(pipe, "max_sequence_length"):
            raise ConfigError(f"max_sequence_length={config.data.max_sequence_length}: prompts of the family "
                              f"{model.family} have one fixed length. Remove it.")
        pipe.max_sequence_length = config.data.max_sequence_length
    return pipe


def objective_of(config: TrainConfig) -> Objective:
    """What the configured run minimises."""
    given = config.objective
    return Objective(
        weighting_scheme=given.weighting_scheme or SCHEMES[given.task.split(":")[0]], logit_mean=given.logit_mean,
        logit_std=given.logit_std, mode_scale=given.mode_scale, posterior=given.posterior,
        guidance_scale=given.guidance_scale,
        prior_loss_weight=given.prior_loss_weight if given.with_prior_preservation else None)


def build_module(config: TrainConfig, pipe: Pipeline, task: str | None = None) -> DiffusionTrainingModule:
    """What is trained, and how; ``task`` None takes the configured one."""
    model = config.model
    module = DiffusionTrainingModule()
    module.pipe, module.fuse = pipe, model.fuse
    draws = Draws(config.run.seed)
    module.switch_pipe_to_training_mode(
        pipe, model.trainable_models, None if model.trainable_models else model.lora_base_model,
        model.lora_target_modules, model.lora_rank, model.lora_alpha, model.lora_checkpoint,
        task=task or config.objective.task, objective=objective_of(config), fp8_models=model.fp8_models,
        use_gradient_checkpointing=model.use_gradient_checkpointing,
        use_gradient_checkpointing_offload=model.use_gradient_checkpointing_offload,
        lora_uniform=lambda name, shape: draws.uniform(f"lora/{name}", np.array([0]), shape)[0])
    return module


def build_sampler(config: TrainConfig, pipe: Pipeline) -> tuple[Any, list[str]]:
    """A function that makes one picture a prompt, always from the same seeds; None when no prompts are configured."""
    given = config.run
    if not given.sample_prompts:
        return None, []
    square = buckets_near_square(config.data.max_pixels, pipe.division_factor, 1)[0]
    height = given.sample_height or config.data.height or square.height
    width = given.sample_width or config.data.width or square.width

    def sampler() -> list[Image.Image]:
        return [pipe(prompt=prompt, height=height, width=width, seed=given.sample_seed + k,
                     num_inference_steps=given.num_inference_steps) for k, prompt in enumerate(given.sample_prompts)]

    return sampler, list(given.sample_prompts)


def _summary(config: TrainConfig, dataset: Any, class_dataset: Any) -> str:
    """What is about to happen, in one line."""
    prior = f" and {_count(class_dataset)} class images" if class_dataset else ""
    return (f"{config.model.family}: {_count(dataset)} pictures{prior}, batch size {config.run.batch_size}, "
            f"task {config.objective.task}, output in {config.run.output_path}\n")


def _count(dataset: UnifiedDataset | CachedRows) -> int:
    return dataset.rows if isinstance(dataset, CachedRows) else len(dataset.rows)
