"""From a configuration to the parts of a run: task, module, data sets, sampler (`run.pipeline`: the pipeline).

The command line, the scripts in `examples/` and the tests build a run from these functions.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ms_diffsynth.config import SETTINGS, DataSection, TrainConfig
from ms_diffsynth.data.buckets import Bucket, make_buckets
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.operators import DataProcessingOperator, describe
from ms_diffsynth.diffusion.tasks import Task, task_class
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, DataError, listing, nearest, shortened
from ms_diffsynth.formats.json_text import NotJSON, parse_json
from ms_diffsynth.launch.worker import still
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import TASKS, family
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.template.units import trained_template_cache
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.two_stage import stage_of


def build_task(config: TrainConfig) -> Task:
    """What the configured run minimises: the family's own task, or that of the setting ``task``.

    Raises: ConfigError for a setting of another task.
    """
    kind, own = config.objective.task.split(":")[0], family(config.model.family).pipeline.objective_class
    name = config.model.family
    if own and kind not in ("sft", "dreambooth"):
        raise ConfigError(f"task={config.objective.task}: the family {name} is trained for one task. Remove it.")
    cls = own or task_class(kind)
    given = {f.name: value for f in fields(cls) if (value := getattr(config.objective, f.name, None)) is not None}
    known = set(given) | {f.name for f in fields(cls)}
    if own is None:
        given = {**TASKS[kind].defaults, **given}
    if "prior_loss_weight" in known:
        known.add("with_prior_preservation")
        given["prior_loss_weight"] = (config.objective.prior_loss_weight if config.objective.with_prior_preservation
                                      else None)
    odd = [f"{n}={getattr(config.objective, n)}" for n, setting in SETTINGS.items()
           if setting.metadata["configures"] == "task" and n not in known
           and getattr(config.objective, n) != setting.default]
    if odd:
        raise ConfigError(f"{listing(odd)}: the family {name} has no such setting for task={kind}. Remove it.")
    return cls(**given)


def build_module(config: TrainConfig, pipe: Pipeline, task: str | None = None,
                 module: DiffusionTrainingModule | None = None) -> DiffusionTrainingModule:
    """What is trained, and how.

    Args:
        task: another stage of the run than ``config.objective.task``.
        module: one of your own class, to be set up; None makes a `DiffusionTrainingModule`.
    """
    model, draws = config.model, Draws(config.run.seed)
    recompute = {"use_gradient_checkpointing": model.use_gradient_checkpointing,
                 "use_gradient_checkpointing_offload": model.use_gradient_checkpointing_offload}
    module = DiffusionTrainingModule() if module is None else module
    module.pipe, module.fuse = pipe, model.fuse
    module.load_training_template_model(pipe, model.template_model_id_or_path, **recompute,
                                        trust_template_code=model.trust_template_code,
                                        trust_template_sha256=model.trust_template_sha256)
    module.switch_pipe_to_training_mode(
        pipe, **recompute, trainable_models=model.trainable_models,
        lora_base_model=None if model.trainable_models else model.lora_base_model, adapter=model.adapter,
        lora_target_modules=model.lora_target_modules, lora_rank=model.lora_rank, lora_alpha=model.lora_alpha,
        lora_checkpoint=model.lora_checkpoint,
        # from the seed of the run, so that a script and the command line start from the same weights
        lora_uniform=lambda name, shape: draws.uniform(f"lora/{name}", np.array([0]), shape)[0],
        task=task or config.objective.task, objective=build_task(config), fp8_models=model.fp8_models,
        extra_inputs=config.data.extra_inputs)
    return module


# -- data ----------------------------------------------------------------------------------------------------------


class DataSets(NamedTuple):
    """The images of a run: a `UnifiedDataset` each, or rows of a cache."""

    instance: Any
    classes: Any = None  # of prior preservation
    validation: Any = None  # held out


def build_datasets(config: TrainConfig) -> DataSets:
    """The training images, the class images when prior preservation is on, and the images that are held out.

    In stage two of split training (task ``...:train``) the first names the folder of the cache, whose images must be
    made as these would be, and the others are None: `launch_training_task` reads all from there.

    Raises: DataError for a bad row; CacheError for another cache.
    """
    data = config.data
    if stage_of(config.objective.task) == "train":
        folder = data.cache_dir or data.dataset_base_path
        cache, columns = Cache(folder), [key.strip() for key in data.data_file_keys.split(",")]
        made = dict.fromkeys(columns, describe(_image_operator(config, "")))
        names = ["instance", *(["class"] if config.objective.with_prior_preservation else [])]
        held_out = [name for name in (cache.manifest or {}).get("rows", {}) if name == "validation"]
        cache.check({"pictures": dict.fromkeys([*names, *held_out], made)})
        return DataSets(UnifiedDataset(folder, repeat=data.dataset_repeat))
    instance = _dataset(config, "dataset", data.dataset_base_path, data.dataset_metadata_path, data.instance_prompt,
                        data.dataset_repeat)
    classes = validation = None
    if config.objective.with_prior_preservation:
        classes = _dataset(config, "class", data.class_base_path, data.class_metadata_path, data.class_prompt)
    if data.validation_share is not None:
        instance, validation = instance.split(data.validation_share, config.run.seed)
    elif data.validation_base_path or data.validation_metadata_path:
        validation = _dataset(config, "validation", data.validation_base_path or data.dataset_base_path,
                              data.validation_metadata_path, data.instance_prompt)
    return DataSets(instance, classes, validation)


def _dataset(config: TrainConfig, name: str, base: str, metadata: str | None, prompt: str | None,
             repeat: int = 1) -> UnifiedDataset:
    """Images and prompts; ``prompt`` serves every image that has none of its own. ``name``: how its settings begin."""
    extra = [name.strip() for name in (config.data.extra_inputs or "").split(",") if name.strip()]
    known = {*family(config.model.family).pipeline().optional_units, "template_inputs"}
    if odd := [name for name in extra if name not in known]:
        raise ConfigError(f"extra_inputs names {', '.join(map(repr, odd))}: expected some of "
                          f"{', '.join(sorted(known))}.{nearest(odd[0], known)}")
    needs_prompts = prompt is None and "prompt" in family(config.model.family).pipeline.inputs
    try:
        dataset = UnifiedDataset(base_path=base, metadata_path=metadata, repeat=repeat,
                                 data_file_keys=config.data.data_file_keys,
                                 main_data_operator=_image_operator(config, base), captions=needs_prompts,
                                 required=[*extra, *(["prompt"] if needs_prompts else [])])
    except DataError as error:
        if str(error).startswith(("base_path=", "metadata_path=")):  # as the class calls what the settings name
            raise DataError(f"{name}_{error}") from error
        if "\n" in str(error):  # the rows, and the file that they stand in
            raise
        raise DataError(f"{name}_{'base' if metadata is None else 'metadata'}_path: {error}") from error
    if prompt is not None:
        dataset.rows = [{"prompt": prompt} | row for row in dataset.rows]
    return dataset


def _image_operator(config: TrainConfig, base: str) -> DataProcessingOperator:
    data, factor = config.data, family(config.model.family).pipeline.division_factor
    buckets = None if data.height else _buckets_near_square(data, factor, data.buckets)
    return UnifiedDataset.default_image_operator(
        base_path=base, max_pixels=data.max_pixels, height=data.height, width=data.width,
        height_division_factor=factor, width_division_factor=factor, buckets=buckets)


def _buckets_near_square(data: DataSection, factor: int, count: int) -> list[Bucket]:
    """The ``count`` buckets of at most ``max_pixels`` pixels whose shape is nearest to a square."""
    return sorted(make_buckets(data.max_pixels, factor), key=lambda b: abs(np.log(b.width / b.height)))[:count]


# -- sample images -------------------------------------------------------------------------------------------------

Sampler = Callable[..., list[Image.Image]]


def build_sampler(config: TrainConfig, pipe: Pipeline) -> tuple[Sampler | None, list[str]]:
    """``sampler()`` makes one image a prompt, always from the same seeds; and the prompts. None without prompts.

    ``sampler(count)`` makes this many, with the prompts in turn. For a family without prompts, ``sampler()`` makes
    ``sample_count`` images.
    """
    run, prompts = config.run, list(config.run.sample_prompts)
    pipe.check_sampler(run.sampler)
    how: dict[str, Any] = {"num_inference_steps": run.num_inference_steps, "sampler": run.sampler}
    if "prompt" not in pipe.inputs:
        size = run.sample_count

        def sampler(count: int = size) -> list[Image.Image]:
            images = []
            for k in range(-(-count // size)):  # groups of one size, for which the network is compiled once
                still()
                images += pipe(batch_size=size, seed=run.sample_seed + k, height=run.sample_height,
                               width=run.sample_width, **how)
            return images[:count]

        return sampler if size else None, []
    if not prompts:
        return None, []
    square = _buckets_near_square(config.data, pipe.division_factor, 1)[0]
    how["height"] = run.sample_height or config.data.height or square.height
    how["width"] = run.sample_width or config.data.width or square.width
    inputs: list[Mapping[str, Any]] = []
    if text := run.sample_template_inputs:
        try:
            given = parse_json(text, None)
        except NotJSON:
            given = None
        inputs = [given] * len(prompts) if isinstance(given, dict) else given
        is_list = isinstance(inputs, list) and len(inputs) == len(prompts)
        if not is_list or not all(isinstance(item, dict) for item in inputs):
            raise ConfigError(f"sample_template_inputs={shortened(text)}: expected a JSON object such as "
                              f"{{\"scale\": 0.5}}, or a list of {len(prompts)}, one for each of sample_prompts.")

    def sampler(count: int = len(prompts)) -> list[Image.Image]:
        caches = [trained_template_cache(pipe, given) for given in inputs] if inputs else [None] * len(prompts)
        images = []
        for k, (prompt, cache) in enumerate(itertools.islice(itertools.cycle(zip(prompts, caches)), count)):
            still()
            images.append(pipe(prompt=prompt, seed=run.sample_seed + k, **how,
                               **({"template_cache": cache} if cache else {})))
        return images

    return sampler, prompts
