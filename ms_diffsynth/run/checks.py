"""What can be found wrong with a run before a model is loaded, a row prepared or a file written.

`config.rules` says which settings exclude each other, `data.dataset` looks at every row and every header. Here is what
needs more than one of settings, data, the output folder and the checkpoint to resume from.
"""
from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from ms_diffsynth.config import TrainConfig
from ms_diffsynth.config.settings import ModelSection
from ms_diffsynth.data.loader import Loader
from ms_diffsynth.errors import ConfigError, DataError, UserError, naming
from ms_diffsynth.evaluate import Evaluator
from ms_diffsynth.formats.weights import read_header
from ms_diffsynth.hub.download import parse_path_or_model_id
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import family
from ms_diffsynth.run.build import DataSets, build_task, pipeline_of_data
from ms_diffsynth.run.samples import check_sample_files, sample_template_inputs
from ms_diffsynth.storage.files import check_writable
from ms_diffsynth.training import same_run
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.hooks.publish import check_token
from ms_diffsynth.training.optim import LearningRate, optimizer_arguments
from ms_diffsynth.training.optim.build import optimizer_class
from ms_diffsynth.training.trackers import check_installed
from ms_diffsynth.training.trainer import steps_in
from ms_diffsynth.training.two_stage import stage_of


def check_settings(accelerator: Accelerator, config: TrainConfig) -> None:
    """What settings alone tell, with the files and folders they name.

    Raises: ConfigError, HubError, WeightError, CheckpointError, OutputError or DataError.
    """
    run, model, stage = config.run, config.model, stage_of(config.objective.task)
    check_token(accelerator, config)
    options = config.optimizer
    probe = Parameter(Tensor(np.zeros((1, 1), np.float32)), name="probe")
    optimizer_class(options.optimizer).from_settings([probe], options.learning_rate, options.weight_decay,
                                                     **optimizer_arguments(options))
    build_task(config)
    for name in ("lora_checkpoint", "preset_lora_path", "weights"):
        if (path := getattr(model, name)) is not None:
            with naming(f"{name}={path}"):
                read_header(path)
    if not model.preset_lora_in_samples:
        _check_preset_left_out(model)
    if model.template_model_id_or_path is not None:
        parse_path_or_model_id(model.template_model_id_or_path)
    if accelerator.is_main_process:
        folders = {"output_path": run.output_path, "cache_dir": config.data.cache_dir if stage != "train" else None}
        for name, folder in folders.items():
            if folder is not None:
                with naming(f"{name}={folder}"):
                    check_writable(folder)
    if stage == "data_process":
        return
    pipeline = family(model.family).pipeline
    same_run.check_folder(Path(run.output_path), run.resume)
    same_run.check_family(Path(run.output_path), run.resume, pipeline.__name__, run.accept_changes)
    pipeline.check_sampler(run.sampler)
    sample_template_inputs(config)
    check_sample_files(config)
    for name in ("sample_steps", "evaluation_steps"):
        if pipeline.medium == "video" and name == "evaluation_steps" and run.evaluation_steps is not None:
            raise ConfigError(f"evaluation_steps={run.evaluation_steps}: the family {model.family} makes videos, which "
                              "are not compared with images. Remove it, and look at the sample videos.")
        if "prompt" in pipeline.inputs and not run.sample_prompts and (every := getattr(run, name)) is not None:
            raise ConfigError(f"{name}={every} without sample_prompts: say what to make images of.")
    check_installed([*run.trackers, *(["tensorboard"] * run.enable_tensorboard_log)])
    if run.evaluation_steps is not None and accelerator.is_main_process:
        Evaluator(run.evaluation_reference or config.data.dataset_base_path)  # describes nothing yet


def _check_preset_left_out(model: ModelSection) -> None:
    """Raises: ConfigError where the preset cannot be taken out of the weights again: for samples they are read from
    the model's files."""
    if model.preset_lora_path is None:
        raise ConfigError("preset_lora_in_samples=false without preset_lora_path: name the file that is left out of "
                          "sample images, or remove it.")
    base = (model.lora_base_model or "").split(",")[0].strip()
    name = model.preset_lora_model or base or family(model.family).pipeline().network
    for setting, why in (("trainable_models", "its weights are trained"), ("fp8_models", "its weights are in 8 bits")):
        if name in [text.split(".")[0].strip() for text in (getattr(model, setting) or "").split(",")]:
            raise ConfigError(f"preset_lora_in_samples=false and {setting}={getattr(model, setting)}: {why}, so the "
                              f"preset of '{name}' cannot be left out of samples. Train a LoRA on weights that are not "
                              "in 8 bits, or set preset_lora_in_samples to true.")


def check_data(accelerator: Accelerator, config: TrainConfig, sets: DataSets) -> None:
    """What the data tell: columns that the family needs, and how many steps the run has.

    Raises: DataError; ConfigError for a learning-rate schedule that does not fit the steps.
    """
    if stage_of(config.objective.task) == "train":  # the cache has been checked
        return
    pipeline, task = family(config.model.family).pipeline, build_task(config)
    extra = [name.strip() for name in (config.data.extra_inputs or "").split(",") if name.strip()]
    medium = pipeline.medium
    images = [medium, *(name for name in extra if name.endswith("image") and medium == "image")]
    for data in (found for found in sets if found is not None):
        if lost := [name for name in images if name not in data.data_file_keys]:
            keys = ",".join(dict.fromkeys((*data.data_file_keys, *lost)))
            raise DataError(f"data_file_keys={','.join(data.data_file_keys)}: {lost[0]} is read as an image, so it "
                            f"must be among them. Set data_file_keys={keys}, or rename your column.")
        for index, row in enumerate(data.rows):
            if isinstance(row[medium], list):
                data.table.blame(index, f"{medium}={row[medium]!r} is a list; expected the name of one file. Give each "
                                        "image a row of its own")
            if "control_mask" in extra and isinstance(row.get("control_mask"), list):
                data.table.blame(index, f"control_mask is a list of {len(row['control_mask'])}; expected the name of "
                                        "one mask, which is for all control images. Name one")
            for name in task.inputs:
                if row.get(name) is None:
                    data.table.blame(index, f"no {name}, which task={config.objective.task} reads. Add it")
        data.table.refuse_bad_rows()
    if medium == "video":
        check_films(pipeline_of_data(config), sets, extra)
    run, optimizer, ranks = config.run, config.optimizer, accelerator.num_processes
    if stage_of(config.objective.task) == "data_process":
        return
    if (pipeline.padded_slots or extra) and run.batch_size * ranks > 1:
        return  # which rows share a batch follows the tokens of prompts, or further inputs: the trainer checks
    loader = Loader(sets.instance, run.batch_size, bucket_of=sets.instance.size_of, class_dataset=sets.classes,
                    class_bucket_of=getattr(sets.classes, "size_of", None), world_size=ranks)
    checkpoint = None
    if run.resume != "none" and (optimizer.lr_warmup_steps or optimizer.lr_scheduler != "constant"):
        try:
            checkpoint = same_run.find_checkpoint(Path(run.output_path), run.resume)
        except UserError:  # told when the run is resumed, with what else is wrong
            return
    LearningRate(schedule=optimizer.lr_scheduler, base=optimizer.learning_rate, warmup_steps=optimizer.lr_warmup_steps,
                 total_steps=steps_in(len(loader), run.batch_size * ranks, optimizer.gradient_accumulation_steps,
                                      run.num_epochs, run.max_train_steps, checkpoint))


def check_films(pipe: Pipeline, sets: DataSets, inputs: Collection[str]) -> None:
    """Raises: ConfigError for a number of frames that cannot be trained on with these inputs; DataError naming the
    films of such a one."""
    for data in (found for found in sets if found is not None and found.clips is not None):
        longest = max(data.clips.lengths)
        if problem := pipe.film_problem(longest, inputs):
            raise ConfigError(f"num_frames={longest}: {problem}.")
        for index, row in enumerate(data.rows):
            if problem := pipe.film_problem(row["clip"]["frames"], inputs):
                data.table.blame(index, f"{row['video']}: {problem}")
        data.table.refuse_bad_rows()
