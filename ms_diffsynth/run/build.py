"""From a configuration to the parts of a run: task, module, data sets (`run.pipeline`: the pipeline, `run.samples`: the
sample images).

The command line, the scripts in `examples/` and the tests build a run from these functions.
"""
from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import fields
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np

from ms_diffsynth.config import SETTINGS, TrainConfig
from ms_diffsynth.data.buckets import Bucket, choose_buckets, describe_fit, own_bucket
from ms_diffsynth.data.clips import Clips, describe_clips
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.folders import folder_of, parse_folders
from ms_diffsynth.data.metadata import models_that_take
from ms_diffsynth.data.operators import DataProcessingOperator, describe
from ms_diffsynth.diffusion.tasks import Task, task_class
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import CacheError, ConfigError, DataError, listing, nearest
from ms_diffsynth.hub.download import parse_path_or_model_id
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import TASKS, family
from ms_diffsynth.run.pipeline import most_pixels, source_of
from ms_diffsynth.run.skeleton import skeleton
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.two_stage import stage_of

logger = logging.getLogger(__name__)


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
    template, hub = model.template_model_id_or_path, source_of(config)
    module.load_training_template_model(pipe, parse_path_or_model_id(template, hub=hub) if template else None,
                                        **recompute,
                                        trust_template_code=model.trust_template_code,
                                        trust_template_sha256=model.trust_template_sha256)
    if model.weights:
        pipe.load_weights(model.weights, is_lazy=True)
    module.switch_pipe_to_training_mode(
        pipe, **recompute, trainable_models=model.trainable_models,
        lora_base_model=None if model.trainable_models else model.lora_base_model, adapter=model.adapter,
        lora_target_modules=model.lora_target_modules, lora_rank=model.lora_rank, lora_alpha=model.lora_alpha,
        lora_checkpoint=model.lora_checkpoint, preset_lora_path=model.preset_lora_path,
        preset_lora_model=model.preset_lora_model,
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
        pipe = pipeline_of_data(config)
        cache, columns = Cache(folder), _file_keys(config, pipe)
        pictures = (cache.manifest or {}).get("fingerprint", {}).get("pictures", {}).get("instance")
        if isinstance(pictures, dict):  # the columns as stage one found them in the metadata
            columns = list(pictures)
        as_it_is = describe(_reference_operator(config, ""))
        unsized = [*_references(config), *_controls(config)]
        made = {key: as_it_is if key in unsized else describe(_operator(config, pipe, "", []))
                for key in columns}
        names = ["instance", *(["class"] if config.objective.with_prior_preservation else [])]
        held_out = [name for name in (cache.manifest or {}).get("rows", {}) if name == "validation"]
        cache.check({"pictures": dict.fromkeys([*names, *held_out], made)})
        return DataSets(UnifiedDataset(folder, repeat=_repeats_of_cache(config, cache)))
    pipe = pipeline_of_data(config)
    instance = _dataset(config, pipe, "dataset", data.dataset_repeat)
    classes = validation = None
    if config.objective.with_prior_preservation:
        classes = _dataset(config, pipe, "class")
    if data.validation_share is not None:
        instance, validation = instance.split(data.validation_share, config.run.seed)
    elif data.validation_base_path or data.validation_metadata_path:
        validation = _dataset(config, pipe, "validation")
    sets = DataSets(instance, classes, validation)
    _resize(config, pipe, sets)
    return sets


def pipeline_of_data(config: TrainConfig) -> Pipeline | type[Pipeline]:
    """What knows how images and videos must be: the family's class; of videos a pipeline without weights, as models of
    one family differ in it.
    """
    cls = family(config.model.family).pipeline
    return skeleton(config, ms.float32)[0] if cls.medium == "video" else cls


def clips_of(config: TrainConfig, pipe: Pipeline | type[Pipeline]) -> Clips | None:
    """How the run takes clips from videos; None for a family of images.

    Raises: ConfigError for a number of frames that the model cannot have, and for settings of videos without videos.
    """
    data = config.data
    if pipe.medium != "video":
        names = ("num_frames", "fps", "clips", "clip_start", "video_column")
        odd = [f"{n}={','.join(v) if isinstance(v := getattr(data, n), tuple) else v}" for n in names
               if getattr(data, n) != SETTINGS[n].default]
        odd += [f"sample_num_frames={config.run.sample_num_frames}"] * (config.run.sample_num_frames is not None)
        if odd:
            raise ConfigError(f"{listing(odd)}: the family {config.model.family} is trained on images. Remove it.")
        return None
    lengths = sorted({int(text) for text in data.num_frames} or {pipe.sampling.num_frames})
    return Clips(lengths=tuple(lengths), rate=data.fps or pipe.frame_rate, place=data.clips, skip=data.clip_start,
                 factor=pipe.frame_factor)


def _file_keys(config: TrainConfig, pipe: Pipeline | type[Pipeline]) -> list[str]:
    """The columns that hold file names; of a family of videos, image means what is learned."""
    keys = [key for key in map(str.strip, config.data.data_file_keys.split(",")) if key]
    return list(dict.fromkeys(pipe.medium if key == "image" else key for key in keys))


def _dataset(config: TrainConfig, pipe: Pipeline | type[Pipeline], name: str, repeat: int = 1) -> UnifiedDataset:
    """The images and prompts of the settings that begin with ``name``: dataset, class or validation."""
    folders = parse_folders(config.data.dataset_folders) if name == "dataset" else {}
    extra = [name.strip() for name in (config.data.extra_inputs or "").split(",") if name.strip()]
    known = {*(pipe() if isinstance(pipe, type) else pipe).optional_units, "template_inputs"}
    if odd := [name for name in extra if name not in known]:
        raise ConfigError(f"extra_inputs names {', '.join(map(repr, odd))}: this model takes no such input; expected "
                          f"some of {', '.join(sorted(known))}.{models_that_take(odd) or nearest(odd[0], known)}")
    optional = [] if name == "class" else _references(config)
    left_out = set(_of_rows(config)) - set(optional)  # class images have none
    extra = [column for column in extra if column not in left_out]
    data, has_prompts = config.data, "prompt" in family(config.model.family).pipeline.inputs
    base, metadata = (getattr(data, f"{name}_{what}_path") for what in ("base", "metadata"))
    prompt = "class_prompt" if name == "class" else "instance_prompt"
    keys = [key for key in _file_keys(config, pipe) if key not in left_out]
    keys += [column for column in (*optional, *_controls(config)) if column not in keys]
    how = {"repeat": repeat, "data_file_keys": keys, "optional": optional,
           "edit_folders": data.edit_folders if name == "dataset" else (), "captions": has_prompts,
           "prompt_setting": prompt, "instance_prompt": getattr(data, prompt) if has_prompts else None,
           "image_column": data.image_column, "video_column": data.video_column, "clips": clips_of(config, pipe),
           "trigger_word": data.trigger_word if has_prompts and name != "class" else None,
           "caption_column": data.caption_column, "allow_outside_base": data.allow_outside_base,
           "required": [pipe.medium, *extra, *(["prompt"] if has_prompts else [])]}
    try:
        if folders:
            return UnifiedDataset.of_folders(data.dataset_base_path, folders, **how)
        return UnifiedDataset(base or data.dataset_base_path, metadata, **how)
    except DataError as error:
        if "\n" in str(error) or f"{name}_" in str(error):  # it says which rows of which file, or the setting
            raise
        setting = "folders" if folders else "base_path" if metadata is None else "metadata_path"
        raise DataError(f"{name}_{setting}: {error}") from error


def _of_rows(config: TrainConfig) -> list[str]:
    """The further inputs of the run that a row may do without."""
    extra = [name.strip() for name in (config.data.extra_inputs or "").split(",")]
    return [name for name in family(config.model.family).pipeline.absent_inputs if name in extra]


def _references(config: TrainConfig) -> list[str]:
    """Those that are columns of images. Of a video they are none: its units take its first frame, or its last."""
    return [] if family(config.model.family).pipeline.medium == "video" else _of_rows(config)


def _controls(config: TrainConfig) -> list[str]:
    """The further inputs of the run that are images as the row's own, place by place."""
    extra = [name.strip() for name in (config.data.extra_inputs or "").split(",")]
    return [name for name in family(config.model.family).pipeline.aligned_inputs if name in extra]


def _check_proportions(images: UnifiedDataset, columns: list[str]) -> None:
    """Raises: DataError naming the rows with a control image that is not of the image's proportions."""
    for row in range(len(images.rows)) if columns else ():
        width, height = images.image_size(row)
        for name in columns:
            for other in images.header_sizes(row, name):
                if abs(other[0] * height / other[1] - width) > max(1.0, 0.01 * width):
                    images.table.blame(row, f"{name} has {other[0]} x {other[1]} pixels and the image {width} x "
                                            f"{height}: expected the same proportions, since it says what is where. "
                                            "Make it of the same picture")
    images.table.refuse_bad_rows()


def _repeats_of_cache(config: TrainConfig, cache: Cache) -> int | list[int]:
    """How often an epoch shows each row of a cache. Raises: CacheError for one that is in none of dataset_folders."""
    data, folders = config.data, parse_folders(config.data.dataset_folders)
    if not folders:
        return data.dataset_repeat
    names = [row.label for row in cache.rows("instance")]
    found = [folder_of(name, folders) for name in names]
    if lost := [name for name, folder in zip(names, found) if folder is None]:
        raise CacheError(f"{cache.folder} has {len(lost)} images of no folder that dataset_folders="
                         f"{','.join(data.dataset_folders)} names: {listing(lost, 3)}. Expected the folders of stage "
                         "one. Correct dataset_folders, or run stage one again with it.")
    return [folders[folder] * data.dataset_repeat for folder in found]


def _resize(config: TrainConfig, pipe: Pipeline | type[Pipeline], sets: DataSets) -> None:
    """Decide at what sizes images are trained, the same for all data sets, and say what that costs."""
    data, factor, things = config.data, pipe.division_factor, f"{pipe.medium}s"
    named = {what: images for what, images in zip((things, f"class {things}", f"held-out {things}"), sets) if images}
    controls = _controls(config)
    for images in named.values():
        _check_proportions(images, controls)
    sizes = {what: [images.image_size(row) for row in range(len(images.rows))] for what, images in named.items()}
    shapes = [*sizes[things], *sizes.get(f"class {things}", ())]
    if data.height:
        buckets, remedy = [Bucket(data.height, data.width)], "Leave out height and width: images then keep their shapes"
        if data.max_pixels:
            logger.warning("max_pixels=%d is not used: height and width are set. Leave them out to use it.",
                           data.max_pixels)
    else:
        most = most_pixels(config, pipe)
        buckets = choose_buckets(shapes, most, factor, _most_buckets(config))
        more = len(buckets) < len({own_bucket(*size, most, factor) for size in shapes})
        remedy = (f"Set buckets={2 * len(buckets)} for more sizes, each of which is a compilation, or crop them"
                  if more else "Raise max_pixels, or crop them")
        if data.max_pixels:
            _warn_of_few_pixels(data.max_pixels, shapes)
    for what, images in named.items():
        names = [images.label(row) for row in range(len(images.rows))]
        line, warnings = describe_fit(sizes[what], names, buckets, remedy, pipe.medium)
        logger.info("%s: %s.", what, line)
        for warning in warnings:
            logger.warning("%s: %s.", what, warning)
        if images.clips is not None:
            chosen = [images.clip_of(row) for row in images.rows]
            told, more = describe_clips(images.clips, images.films, chosen)
            logger.info("%s: %s.", what, "; ".join(f"{label}: {text}" for label, text in told))
            for warning in more:
                logger.warning("%s: %s.", what, warning)
        operator = _operator(config, pipe, images.base_path, buckets)
        images.use_buckets(() if data.height else buckets, operator)
        images.special_operator_map |= dict.fromkeys((*_references(config), *controls),
                                                     _reference_operator(config, images.base_path))
    held: Counter = Counter()
    repeat = sets.instance.repeat
    for row in range(len(sizes[things])):
        held[sets.instance.size_of(row)] += repeat if isinstance(repeat, int) else repeat[row]
    again = sum(-count % config.run.batch_size for count in held.values())
    if again and len(held) > 1:
        logger.info("a batch holds %s of one size: to fill batches of %d, %d %s come once more in each epoch.",
                    things, config.run.batch_size, again, things)


def _most_buckets(config: TrainConfig) -> int | None:
    """None leaves their number open. With class images, of which a batch needs some of its size, it is 1 by default."""
    is_open = config.data.buckets is None
    return 1 if is_open and config.objective.with_prior_preservation else config.data.buckets


def _warn_of_few_pixels(max_pixels: int, sizes: list[tuple[int, int]]) -> None:
    """Say when ``max_pixels`` looks like a side, or shrinks images to less than families are trained for."""
    shrunk = sum(width * height > max_pixels for width, height in sizes)
    if shrunk and max_pixels < 256 * 256:
        side = math.isqrt(max_pixels)
        meant = (f"Did you mean {max_pixels**2} ({max_pixels} x {max_pixels})?" if 64 <= max_pixels <= 4096 else
                 "Most families need max_pixels=65536 (256 x 256) or more.")
        logger.warning("max_pixels=%d is %d x %d pixels, to which %d of %d images are shrunk. %s", max_pixels, side,
                       side, shrunk, len(sizes), meant)


def _operator(config: TrainConfig, pipe: Pipeline | type[Pipeline], base: str,
              buckets: list[Bucket]) -> DataProcessingOperator:
    """What reads an image or a clip, and brings it to its size."""
    data, factor, most = config.data, pipe.division_factor, most_pixels(config, pipe)
    rule = {"max_pixels": most, "most": _most_buckets(config), "factor": factor}
    same = {"base_path": base, "max_pixels": most, "height": data.height, "width": data.width,
            "buckets": None if data.height else buckets, "allow_outside_base": data.allow_outside_base,
            "chosen_by": rule}
    if (clips := clips_of(config, pipe)) is not None:
        return UnifiedDataset.default_video_operator(clips=clips, division_factor=factor, **same)
    return UnifiedDataset.default_image_operator(height_division_factor=factor, width_division_factor=factor, **same)


def _reference_operator(config: TrainConfig, base: str) -> DataProcessingOperator:
    """References and control images are read as they are; the pipeline brings each to its size."""
    return UnifiedDataset.default_image_operator(base_path=base, resize=False,
                                                 allow_outside_base=config.data.allow_outside_base)
