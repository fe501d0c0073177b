"""A training run from beginning to end: `train` takes a configuration, `launch_training_task` takes the parts."""
from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.config import TrainConfig, flat, to_yaml
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.errors import CacheError, ConfigError, OutputError, UserError, naming, said
from ms_diffsynth.run.build import DataSets, build_datasets, build_module
from ms_diffsynth.run.checks import check_data, check_settings
from ms_diffsynth.run.header import file_header
from ms_diffsynth.run.pipeline import build_pipeline, most_pixels
from ms_diffsynth.run.plan import plan_run, short_form
from ms_diffsynth.run.samples import (
    build_sampler,
    check_prompts,
    prompts_to_prepare,
    sample_controls,
    sample_references,
    shown,
)
from ms_diffsynth.training import same_run
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.hooks.checkpoints import Checkpoints
from ms_diffsynth.training.hooks.contract import Hook
from ms_diffsynth.training.hooks.evaluation import Evaluation
from ms_diffsynth.training.hooks.pairs import Pairs
from ms_diffsynth.training.hooks.publish import Publishing, check_token
from ms_diffsynth.training.hooks.samples import Samples
from ms_diffsynth.training.hooks.tracking import Tracking
from ms_diffsynth.training.hooks.validation import Validation
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.prepared import PreparedRows
from ms_diffsynth.training.trainer import Trainer
from ms_diffsynth.training.two_stage import launch_data_process_task, open_cache, stage_of


def train(config: TrainConfig, hooks: Sequence[Hook] = ()) -> ModelLogger:
    """Train as configured, as ``ms-diffsynth train`` does. Nothing is written before data and settings are known to be
    sound.

    Args:
        hooks: of your own, after those that the configuration asks for.

    Returns: the logger, which knows what was saved. Raises: as `launch_training_task`.
    """
    data, run = config.data, config.run
    kinds = (OutputError, CacheError) if data.cache_dir else ()
    size = {"max_pixels": most_pixels(config)} if data.height is None else {"height": data.height, "width": data.width}
    with runtime.memory_for(batch_size=run.batch_size, **size, sample_height=run.sample_height,
                            sample_width=run.sample_width), naming(f"cache_dir={data.cache_dir}", kinds):
        return _train(config, hooks)


def _train(config: TrainConfig, hooks: Sequence[Hook]) -> ModelLogger:
    accelerator = Accelerator.of(config.flat())
    if accelerator.num_processes > 1:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"rank {accelerator.process_index}: %(levelname)s: %(message)s"))
    stage, cache_dir = stage_of(config.objective.task), config.data.cache_dir
    check_settings(accelerator, config)
    sets = build_datasets(config)
    check_data(accelerator, config, sets)
    images = sets.instance
    if accelerator.is_main_process:
        sys.stderr.write(_forecast(config, sets))
    pipe = build_pipeline(config)
    prompts = prompts_to_prepare(config, pipe)  # what is wrong with them is told before a model is loaded
    logger = ModelLogger(config.run.output_path, config.model.remove_prefix_in_ckpt, config.run.enable_tensorboard_log)
    rows = getattr(images, "rows", ())
    logger.metadata = file_header(config, pipe.lora_table, rows if isinstance(rows, int) else len(rows))
    if stage == "data_process" or (cache_dir and not stage):
        pipe.keeps_models = stage == "data_process"  # and the process ends
        module = build_module(config, pipe, f"{config.objective.task.partition(':')[0]}:data_process")
        launch_data_process_task(accelerator, sets.instance, module, logger, sets.classes, cache_dir,
                                 validation_dataset=sets.validation, prompts=prompts)
        pipe.unload_models(pipe.model_names)  # both stages are never in memory together
    if stage == "data_process":
        return logger
    if stage == "train":
        check_prompts(config, pipe, cache_dir or images.base_path)
    module = build_module(config, pipe)
    cut = module.training_cut()
    if stage == "train" or cache_dir:
        sets = DataSets(*open_cache(cache_dir or sets.instance.base_path, module, cut, repeat=sets.instance.repeat))
    else:
        pipe.load_models_to_device(cut.models("prepare"))
    pipe.load_models_to_device(cut.models("step"))
    if accelerator.is_main_process:
        logger.files["config.yaml"] = to_yaml(config).encode()
        scale = getattr(pipe.objective, "guidance_scale", None) if pipe.takes_guidance else None
        sys.stderr.write(f"{pipe.objective}{'' if scale is None else f', embedded guidance {scale:g}'}\n")
    if "edit_image" in pipe.inputs and sets.instance is not images:  # rows of a cache, whose images are still there
        hooks = [Pairs(images), *hooks]
    references = sample_references(config, pipe, images)
    controls = sample_controls(config, pipe, images)
    sampler, captions = build_sampler(config, pipe, images, references, controls)
    if controls and not references:
        references, logger.reference_title = list(map(shown, controls)), "control image"
    return launch_training_task(accelerator, sets.instance, module, logger, class_dataset=sets.classes,
                                validation_dataset=sets.validation, args=config, sampler=sampler,
                                sample_captions=captions, sample_references=references, hooks=hooks)


def _forecast(config: TrainConfig, sets: DataSets) -> str:
    """What the run takes, in two lines. Warnings are left to where the models are opened, and so are mistakes."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return short_form(plan_run(config, sets, is_short=True))
    except UserError:
        return ""
    except Exception as error:  # no run ends for want of a forecast
        return f"what this run takes is not known ({said(error)})\n"
    finally:
        logging.disable(disabled)


def launch_training_task(accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule,
                         model_logger: ModelLogger, learning_rate: float = 1e-5, weight_decay: float = 1e-2,
                         num_workers: int = 1, save_steps: int | None = None, num_epochs: int | None = 1,
                         args: Any = None, class_dataset: Any = None,
                         sampler: Callable[..., list[Image.Image]] | None = None,
                         sample_captions: list[str] | None = None,
                         sample_references: Sequence[Sequence[Image.Image]] = (),
                         settings: dict[str, Any] | None = None,
                         validation_dataset: Any = None, hooks: Sequence[Hook] = (), **options: Any) -> ModelLogger:
    """Train ``model`` on ``dataset`` and write everything through ``model_logger``.

    Args:
        args: a `TrainConfig`, or an object (a parsed command line) whose attributes override every other option.
        class_dataset: class images for prior preservation; each batch is then instances followed by as many of these.
        sampler: makes sample images with the current weights; called before the first step, every ``sample_steps``
            and at the end. sample_captions: what is written under them. With ``evaluation_steps`` it is also called
            with a number of images, as that of `build_sampler` can be. sample_references: the reference images of each,
            which are shown above it.
        settings: what else training_args.json should hold.
        validation_dataset: held-out rows; their loss is computed every ``validation_steps``.
        hooks: of your own, see `training.hooks.contract.Hook`; they come after the others.
        options: any other field of `TrainingOptions`.

    In a job of several ranks each calls this; ``batch_size`` is that of a rank, and the first rank alone writes, except
    for its part of divided moments.

    Returns: the logger. Raises: TrainingError after 20 non-finite steps in a row; ConfigError for impossible options;
        HubError for ``args.push_to_hub`` without a token; CheckpointError for a checkpoint that this run cannot resume
        from; OutputError for a folder in use; Stopped, which ends the process, after SIGTERM or SIGINT.
    """
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay, "num_workers": num_workers,
             "save_steps": save_steps, "num_epochs": num_epochs,
             "gradient_accumulation_steps": accelerator.gradient_accumulation_steps}
    check_token(accelerator, args)
    chosen = TrainingOptions.of(args, given | options)
    is_main = accelerator.is_main_process
    model_logger.is_writing = is_main
    prompts = prompts_to_prepare(args, model.pipe) if isinstance(args, TrainConfig) else None
    if sampler is not None and prompts is not None and stage_of(model.task) == "train" and not isinstance(
            dataset, PreparedRows):
        check_prompts(args, model.pipe, args.data.cache_dir or dataset.base_path)
    sets = rows_of_run(accelerator, model, model_logger, DataSets(dataset, class_dataset, validation_dataset), args,
                       prompts)
    settings = (settings or {}) | flat(args) | dataclasses.asdict(chosen) | {
        "mode": accelerator.mode, "device": accelerator.device, "num_processes": accelerator.num_processes}
    given = flat(args)
    names = dict.fromkeys([*given.get("trackers", ()), *(["tensorboard"] * model_logger.enable_tensorboard_log)])
    tracking = [Tracking(list(names), given.get("tracker_project") or "ms_diffsynth")] if names and is_main else []
    model_logger.references = [list(images) for images in sample_references]
    model_logger.frame_rate = given.get("fps") or model.pipe.frame_rate
    looking: list[Hook] = []
    if "edit_image" in model.pipe.inputs and isinstance(dataset, UnifiedDataset):
        looking.append(Pairs(dataset))
    if sampler is not None:
        looking.append(Samples(sampler, sample_captions or [], chosen.sample_steps))
    if chosen.validation_steps is not None:
        if sets.validation is None:
            raise ConfigError(f"validation_steps={chosen.validation_steps}, but no images are held out: give "
                              "validation_dataset, or set validation_share; of a cache, in both stages.")
        looking.append(Validation(sets.validation, chosen.validation_steps))
    if chosen.evaluation_steps is not None and is_main:
        images = flat(args).get("dataset_base_path") or getattr(dataset, "base_path", None)
        looking.append(Evaluation(sampler, chosen.evaluation_reference or images, chosen.evaluation_count,
                                  chosen.evaluation_steps))
    with same_run.holding(model_logger.output_path) if is_main else nullcontext():
        cut = None if model.has_own_forward else model.training_cut()
        identity = same_run.identity(accelerator, model, cut, chosen, args, sets.instance, sets.classes)
        same_run.check_same_everywhere(accelerator, identity)
        checkpoint = same_run.find_for_all(accelerator, model_logger.output_path, chosen.resume)
        changes = same_run.check_identity(checkpoint, identity, chosen.accept_changes) if checkpoint else []
        saving = Checkpoints(chosen.save_steps, chosen.checkpoint_steps, chosen.keep_checkpoints, sample_captions or [],
                             changes)
        Trainer(accelerator, sets.instance, model, model_logger, chosen, class_dataset=sets.classes,
                hooks=[*tracking, Publishing(sets.instance, args), saving, *looking, *hooks], identity=identity,
                resume_from=checkpoint, settings=settings).run()
    return model_logger


def rows_of_run(accelerator: Accelerator, model: DiffusionTrainingModule, logger: ModelLogger, sets: DataSets,
                args: Any, prompts: Sequence[str] | None = None) -> DataSets:
    """The data sets themselves, or the rows of a cache: for stage two of split training, or when ``args.cache_dir`` is
    given; then what it does not hold yet is prepared first.

    Args:
        prompts: those of sample images, for the cache; None when these are not known: the encoders are then loaded for
            them again.

    Raises: CacheError when this job cannot train on the cache; ConfigError for a module that trains eagerly.
    """
    stage, folder = stage_of(model.task), flat(args).get("cache_dir")
    if isinstance(sets.instance, PreparedRows) or not (folder or stage == "train"):
        return sets
    if model.has_own_forward:
        raise ConfigError(f"{type(model).__name__}.forward with {f'cache_dir={folder}' if folder else model.task}: a "
                          "cache holds what the compiled step needs, and an own forward takes raw rows. Remove "
                          "forward, or train with task='sft' and no cache_dir.")
    cut = model.training_cut()
    if stage != "train":
        model.pipe.keeps_models = False
        launch_data_process_task(accelerator, sets.instance, model, logger, sets.classes, folder,
                                 validation_dataset=sets.validation, prompts=prompts or ())
        model.pipe.unload_models(set(cut.models("prepare")) - set(cut.models("step")))
    found = open_cache(folder or sets.instance.base_path, model, cut, repeat=getattr(sets.instance, "repeat", 1))
    if stage != "train" and prompts is None:
        model.pipe.prepared_prompts = None
    return DataSets(*found)
