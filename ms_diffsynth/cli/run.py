"""One training run from a configuration: pipeline, data, module, logger, sampler, loop.

The command line and the scripts in `examples/` build a run from the same functions. These take *settings*: an object
with every setting of `config` as an attribute, as ``training_parser(...).parse_args()`` returns one.
"""
from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.config import SETTINGS, TrainConfig, to_yaml
from ms_diffsynth.data.buckets import Bucket, make_buckets
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.operators import DataProcessingOperator, describe
from ms_diffsynth.diffusion.tasks import TASKS
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, listing
from ms_diffsynth.hub.download import ModelConfig, parse_model_id_with_origin_paths, parse_path_or_model_id
from ms_diffsynth.launch.worker import still
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.redact import redact
from ms_diffsynth.registry import family
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.template.units import trained_template_cache
from ms_diffsynth.train.distributed import Accelerator
from ms_diffsynth.train.hooks.publish import check_token
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.module import DiffusionTrainingModule
from ms_diffsynth.train.optim import optimizer_arguments
from ms_diffsynth.train.prepared import CachedRows
from ms_diffsynth.train.same_run import check_folder
from ms_diffsynth.train.trainer import launch_training_task
from ms_diffsynth.train.two_stage import launch_data_process_task, open_cache, stage_of


def run(config: TrainConfig) -> ModelLogger:
    """Train as configured. Nothing is written before data, settings and weights are known to be sound."""
    settings = SimpleNamespace(**config.flat())
    stage, cache_dir = stage_of(settings.task), settings.cache_dir
    accelerator = Accelerator.of(settings)
    _tag_logs(accelerator)
    check_token(accelerator, settings)
    optimizer_arguments(settings)
    if stage != "data_process":
        check_folder(Path(settings.output_path), settings.resume)
    sets = build_datasets(settings, family(settings.family).pipeline.division_factor)
    pipe = build_pipeline(config)
    records = ModelLogger(settings.output_path, settings.remove_prefix_in_ckpt, settings.enable_tensorboard_log)
    records.metadata = {"ms_diffsynth.family": settings.family}
    if stage == "data_process" or (cache_dir and not stage):
        pipe.keeps_models = stage == "data_process"  # and the process ends
        module = build_module(settings, pipe, f"{settings.task.partition(':')[0]}:data_process")
        launch_data_process_task(accelerator, sets[0], module, records, sets[1], cache_dir)
        pipe.unload_models(pipe.model_names)  # both stages are never in memory together
    if stage == "data_process":
        return records
    module = build_module(settings, pipe, settings.task)
    cut = module.training_cut()
    if stage == "train" or cache_dir:
        sets = open_cache(cache_dir or sets[0].base_path, module, cut, repeat=settings.dataset_repeat)
    else:
        pipe.load_models_to_device(cut.models("prepare"))
    pipe.load_models_to_device(cut.models("step"))
    if accelerator.is_main_process:
        records.files["config.yaml"] = to_yaml(config).encode()
        sys.stderr.write(redact(_summary(settings, pipe.objective, *sets)))
    sampler, captions = build_sampler(settings, pipe)
    return launch_training_task(accelerator, sets[0], module, records, class_dataset=sets[1], args=settings,
                                sampler=sampler, sample_captions=captions)


def _tag_logs(accelerator: Accelerator) -> None:
    """Begin every line of a log with the rank, when there are several."""
    if accelerator.num_processes > 1:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"rank {accelerator.process_index}: %(levelname)s: %(message)s"))


def _summary(settings: Any, objective: Any, dataset: Any, class_dataset: Any) -> str:
    """What is about to happen, in two lines."""
    prior = f" and {_count(class_dataset)} class images" if class_dataset else ""
    return (f"{settings.family}: {_count(dataset)} pictures{prior}, batch size {settings.batch_size}, "
            f"task {settings.task}, output in {settings.output_path}\n{objective}\n")


def _count(dataset: UnifiedDataset | CachedRows) -> int:
    return dataset.rows if isinstance(dataset, CachedRows) else len(dataset.rows)


# -- data ----------------------------------------------------------------------------------------------------------


def build_datasets(settings: Any, factor: int) -> tuple[UnifiedDataset, UnifiedDataset | None]:
    """The training pictures, and the class images when prior preservation is on.

    In stage two of split training (task ``...:train``) the first names the folder of the cache, whose pictures must be
    made as these would be, and the second is None: `launch_training_task` reads both from there.

    Args:
        factor: heights and widths are multiples of this many pixels; a pipeline's ``division_factor``.

    Raises: DataError for a bad row; CacheError for another cache.
    """
    has_classes = settings.with_prior_preservation
    if stage_of(settings.task) == "train":
        folder = settings.cache_dir or settings.dataset_base_path
        names = ("instance", "class") if has_classes else ("instance",)
        Cache(folder).check({"pictures": dict.fromkeys(names, _operators(settings, factor))})
        return UnifiedDataset(folder, repeat=settings.dataset_repeat), None
    instance = _dataset(settings, factor, settings.dataset_base_path, settings.dataset_metadata_path,
                        settings.instance_prompt, settings.dataset_repeat)
    if not has_classes:
        return instance, None
    return instance, _dataset(settings, factor, settings.class_base_path, settings.class_metadata_path,
                              settings.class_prompt)


def _dataset(settings: Any, factor: int, base: str, metadata: str | None, prompt: str | None,
             repeat: int = 1) -> UnifiedDataset:
    """Pictures and prompts; ``prompt`` serves every picture that has none of its own."""
    extra = [name for name in (settings.extra_inputs or "").split(",") if name]
    needs_prompts = prompt is None and "prompt" in family(settings.family).pipeline.inputs
    dataset = UnifiedDataset(base_path=base, metadata_path=metadata, repeat=repeat,
                             data_file_keys=settings.data_file_keys,
                             main_data_operator=_operator(settings, factor, base), captions=needs_prompts,
                             required=[*extra, *(["prompt"] if needs_prompts else [])])
    if prompt is not None:
        dataset.rows = [{"prompt": prompt} | row for row in dataset.rows]
    return dataset


def _operator(settings: Any, factor: int, base: str) -> DataProcessingOperator:
    buckets = None if settings.height else buckets_near_square(settings.max_pixels, factor, settings.buckets)
    return UnifiedDataset.default_image_operator(
        base_path=base, max_pixels=settings.max_pixels, height=settings.height, width=settings.width,
        height_division_factor=factor, width_division_factor=factor, buckets=buckets)


def _operators(settings: Any, factor: int) -> dict[str, Any]:
    """What the data sets would do to their pictures, wherever these lie; see `UnifiedDataset.operators`."""
    columns = [key.strip() for key in settings.data_file_keys.split(",")]
    return dict.fromkeys(columns, describe(_operator(settings, factor, "")))


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
    own = [c.name for c in pipeline.components if c.is_tokenizer]
    found = {}
    for name in (n.removesuffix("_path") for n in SETTINGS if n.startswith("tokenizer") and n.endswith("_path")):
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


def objective_of(settings: Any) -> Any:
    """What the configured run minimises: the family's kind of objective.

    Raises: ConfigError for a setting of another kind of objective.
    """
    kind, own = settings.task.split(":")[0], family(settings.family).pipeline.objective_class
    if own and kind not in ("sft", "dreambooth"):
        raise ConfigError(f"task={settings.task}: the family {settings.family} is trained for one task. Remove it.")
    cls = own or TASKS[kind].task
    given = {f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)}
    known = {*given, "task"}
    if own is None:
        given |= {n: v for n, v in TASKS[kind].defaults.items() if getattr(settings, n) is None}
    if "prior_loss_weight" in given:
        known.add("with_prior_preservation")
        given["prior_loss_weight"] = settings.prior_loss_weight if settings.with_prior_preservation else None
    odd = [f"{name}={getattr(settings, name)}" for name, setting in SETTINGS.items() if setting.section == "objective"
           and name not in known and getattr(settings, name) != setting.default]
    if odd:
        raise ConfigError(f"{listing(odd)}: the family {settings.family} has no such setting for task={kind}. "
                          "Remove it.")
    return cls(**given)


def training_mode(settings: Any) -> dict[str, Any]:
    """The arguments of `DiffusionTrainingModule.switch_pipe_to_training_mode`: what is trained, and how.

    A LoRA starts from the seed of the run, so that a script and the command line start from the same one.
    """
    draws = Draws(settings.seed)
    return {
        "trainable_models": settings.trainable_models,
        "lora_base_model": None if settings.trainable_models else settings.lora_base_model,
        "adapter": settings.adapter,
        "lora_target_modules": settings.lora_target_modules,
        "lora_rank": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_checkpoint": settings.lora_checkpoint,
        "lora_uniform": lambda name, shape: draws.uniform(f"lora/{name}", np.array([0]), shape)[0],
        "task": settings.task,
        "objective": objective_of(settings),
        "fp8_models": settings.fp8_models,
        "extra_inputs": settings.extra_inputs,
        "use_gradient_checkpointing": settings.use_gradient_checkpointing,
        "use_gradient_checkpointing_offload": settings.use_gradient_checkpointing_offload,
    }


def template_settings(settings: Any) -> dict[str, Any]:
    """The arguments of `DiffusionTrainingModule.load_training_template_model`."""
    return {
        "path_or_model_id": settings.template_model_id_or_path,
        "trust_template_code": settings.trust_template_code,
        "trust_template_sha256": settings.trust_template_sha256,
        "use_gradient_checkpointing": settings.use_gradient_checkpointing,
        "use_gradient_checkpointing_offload": settings.use_gradient_checkpointing_offload,
    }


def build_module(settings: Any, pipe: Pipeline, task: str) -> DiffusionTrainingModule:
    """What is trained, and how, in one stage of the run."""
    module = DiffusionTrainingModule()
    module.pipe, module.fuse = pipe, settings.fuse
    module.load_training_template_model(pipe, **template_settings(settings))
    module.switch_pipe_to_training_mode(pipe, **training_mode(settings) | {"task": task})
    return module


Sampler = Callable[..., list[Image.Image]]


def build_sampler(settings: Any, pipe: Pipeline) -> tuple[Sampler | None, list[str]]:
    """``sampler()`` makes one picture a prompt, always from the same seeds; and the prompts. None without prompts.

    ``sampler(count)`` makes so many, with the prompts in turn. For a family without prompts, ``sampler()`` makes
    ``sample_count`` pictures.
    """
    pipe.check_sampler(settings.sampler)
    prompts = list(settings.sample_prompts)
    if "prompt" not in pipe.inputs:
        return (_sampler_without_prompts(settings, pipe) if settings.sample_count else None), []
    if not prompts:
        return None, []
    square = buckets_near_square(settings.max_pixels, pipe.division_factor, 1)[0]
    height = settings.sample_height or settings.height or square.height
    width = settings.sample_width or settings.width or square.width
    inputs = _sample_template_inputs(settings.sample_template_inputs, len(prompts))

    def sampler(count: int = len(prompts)) -> list[Image.Image]:
        caches = [trained_template_cache(pipe, given) for given in inputs] if inputs else [None] * len(prompts)
        turns = itertools.islice(itertools.cycle(zip(prompts, caches)), count)
        pictures = []
        for k, (prompt, cache) in enumerate(turns):
            still()
            pictures.append(pipe(prompt=prompt, height=height, width=width, seed=settings.sample_seed + k,
                                 num_inference_steps=settings.num_inference_steps, sampler=settings.sampler,
                                 **({"template_cache": cache} if cache else {})))
        return pictures

    return sampler, prompts


def _sampler_without_prompts(settings: Any, pipe: Pipeline) -> Sampler:
    size = settings.sample_count

    def sampler(count: int = size) -> list[Image.Image]:
        pictures = []
        for k in range(-(-count // size)):  # groups of one size, for which the network is compiled once
            still()
            pictures += pipe(batch_size=size, seed=settings.sample_seed + k, height=settings.sample_height,
                             width=settings.sample_width, num_inference_steps=settings.num_inference_steps,
                             sampler=settings.sampler)
        return pictures[:count]

    return sampler


def _sample_template_inputs(text: str | None, count: int) -> list[dict[str, Any]]:
    if not text:
        return []
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    given = [given] * count if isinstance(given, dict) else given
    if not isinstance(given, list) or len(given) != count or not all(isinstance(item, dict) for item in given):
        raise ConfigError(f"sample_template_inputs={text}: expected a JSON object such as {{\"scale\": 0.5}}, or a "
                          f"list of {count}, one for each of sample_prompts.")
    return given
