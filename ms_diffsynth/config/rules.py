"""What settings mean together: every combination that cannot be meant."""
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING

from ms_diffsynth.config.settings import SETTINGS, TrainConfig
from ms_diffsynth.data.folders import folder_problems
from ms_diffsynth.data.metadata import FURTHER_INPUTS
from ms_diffsynth.errors import listing, nearest
from ms_diffsynth.registry import OPTIMIZERS, TRACKERS

PLACES = tuple(name for name, setting in SETTINGS.items() if setting.metadata["holds"] == "path")


def rules(c: TrainConfig) -> Iterator[tuple[bool, str]]:
    """(is it wrong, what to say) for each rule. What depends on the family's units is checked when the run is built."""
    for name in PLACES:
        value = c.flat()[name]
        yield (value is not None and not value.strip(), f"{name} is empty: expected the name of a file or folder"
               f"{'.' if SETTINGS[name].default is MISSING else '; leave it out for what is usual.'}")
    for problem in folder_problems(c.data.dataset_folders):
        yield True, problem
    yield (bool(c.data.dataset_folders) and c.data.dataset_metadata_path is not None,
           f"dataset_metadata_path={c.data.dataset_metadata_path} with dataset_folders, each of which has captions or "
           "metadata of its own: remove one. A row that a metadata file lists twice is shown twice.")
    yield (bool(c.data.dataset_folders) and c.run.evaluation_steps is not None and c.run.evaluation_reference is None,
           f"evaluation_steps={c.run.evaluation_steps} with dataset_folders: say what images are compared with, by "
           "evaluation_reference, a folder.")
    yield (c.data.trigger_word is not None and not c.data.trigger_word.strip(),
           "trigger_word is empty: expected a word; leave it out for none.")
    for text in c.data.num_frames:
        yield (not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= 100000),
               f"num_frames has '{text}': expected whole numbers from 1 to 100000, such as 17,33.")
    prior = c.objective.with_prior_preservation
    kind, _, stage = c.objective.task.partition(":")
    yield (c.run.num_epochs is None and c.run.max_train_steps is None and stage != "data_process",
           "neither num_epochs nor max_train_steps is set: say how long to train, for example --num_epochs 1.")
    yield (not c.model.trainable_models and not c.model.lora_base_model,
           "neither lora_base_model nor trainable_models is set: say what to train, for example --lora_base_model dit.")
    for section, one, other in (("data", "height", "width"), ("run", "sample_height", "sample_width")):
        given = [getattr(getattr(c, section), name) is not None for name in (one, other)]
        yield given[0] != given[1], f"only one of {one} and {other} is set: set both, or neither."
    yield (c.data.height is not None and (c.data.buckets or 1) > 1,
           f"buckets={c.data.buckets} with a fixed height and width: remove these for dynamic resolution, or buckets.")
    yield (prior and c.data.class_base_path is None,
           "with_prior_preservation=true without class_base_path: name the folder of the class images.")
    yield (prior and kind != "dreambooth",
           f"with_prior_preservation=true with task={c.objective.task}: expected task=dreambooth.")
    unused = [n for n in ("class_base_path", "class_metadata_path", "class_prompt") if getattr(c.data, n) is not None]
    yield (bool(unused) and not prior,
           f"{listing(unused)} would not be used: set with_prior_preservation=true, or remove it.")
    yield (c.model.trainable_models is not None and c.model.lora_checkpoint is not None,
           f"lora_checkpoint={c.model.lora_checkpoint} with trainable_models, which trains no LoRA: remove one.")
    yield (c.model.trainable_models is not None and c.model.adapter != SETTINGS["adapter"].default,
           f"adapter={c.model.adapter} with trainable_models, which trains no adapter: remove one.")
    extra = [n.strip() for n in (c.data.extra_inputs or "").split(",") if n.strip()]
    unread = [name for name, value in (("controlnet", c.model.controlnet), ("control_mode", c.data.control_mode))
              if value is not None]
    needed = {"edit_image": c.data.edit_folders or c.data.edit_max_pixels, "control_image": unread,
              "template_inputs": c.model.template_model_id_or_path}
    absent = [name for name, settings in needed.items() if settings and name not in extra]
    for name in extra:
        meant = "" if name in FURTHER_INPUTS else nearest(name, absent)
        yield bool(meant), f"extra_inputs names '{name}': expected some of {listing(FURTHER_INPUTS)}.{meant}"
    yield (bool(c.data.edit_folders) and "edit_image" not in extra,
           f"edit_folders={','.join(c.data.edit_folders)} would not be used: set extra_inputs=edit_image.")
    others = [name for name in ("dataset_metadata_path", "dataset_folders") if getattr(c.data, name)]
    yield (bool(c.data.edit_folders) and bool(others),
           f"edit_folders={','.join(c.data.edit_folders)} with {listing(others)}: remove one. In metadata the column "
           "edit_image names the references.")
    for name in c.data.edit_folders:
        inside = os.path.normpath(name)
        yield (inside == "." or os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir,
               f"edit_folders has '{name}': expected a folder inside dataset_base_path.")
    yield (len(set(map(os.path.normpath, c.data.edit_folders))) < len(c.data.edit_folders),
           f"edit_folders={','.join(c.data.edit_folders)} names a folder twice: an image would have the same reference "
           "twice. Keep one.")
    yield (c.data.edit_max_pixels is not None and "edit_image" not in extra,
           f"edit_max_pixels={c.data.edit_max_pixels} would not be used: set extra_inputs=edit_image.")
    yield (prior and "edit_image" in extra,
           "with_prior_preservation=true with edit_image: class images have no references. Remove one of the two; rows "
           "without a reference may be in the same data set.")
    prompts = len(c.run.sample_prompts)
    for name in ("sample_edit_images", "sample_control_images", "sample_control_masks"):
        images = len(getattr(c.run, name))
        yield (images > 1 and images != prompts,
               f"{name} names {images}, sample_prompts {prompts}: expected one for all, or one for each.")
    controls = [name for name in extra if name.startswith("control_")]
    yield (bool(unread) and not controls,
           f"{listing(unread)} would not be used: set extra_inputs=control_image.")
    counts = [n for n in ("controlnet_layers", "controlnet_single_layers") if getattr(c.model, n) is not None]
    yield (bool(counts) and c.model.controlnet != "new",
           f"{listing(counts)} would not be used: they are of a new ControlNet. Set controlnet=new, or remove it.")
    yield (prior and bool(controls),
           "with_prior_preservation=true with control images, which class images have none of. Remove one of the two.")
    yield (c.model.template_model_id_or_path is not None and "template_inputs" not in extra,
           f"template_model_id_or_path={c.model.template_model_id_or_path} without its input: set "
           "extra_inputs=template_inputs.")
    yield (c.model.template_model_id_or_path is None and "template_inputs" in extra,
           "extra_inputs names template_inputs without a template: set template_model_id_or_path.")
    highest = OPTIMIZERS[c.optimizer.optimizer if c.optimizer.optimizer in OPTIMIZERS else "adamw"].highest_rate
    yield (c.optimizer.learning_rate > highest, f"learning_rate={c.optimizer.learning_rate}: expected 0 < lr <= "
           f"{highest} for optimizer={c.optimizer.optimizer}.")
    limit = c.run.max_train_steps
    yield (limit is not None and c.optimizer.lr_warmup_steps > limit,
           f"lr_warmup_steps={c.optimizer.lr_warmup_steps} exceeds max_train_steps={limit}: warm up for fewer steps.")
    held_out = [n for n in ("validation_share", "validation_base_path", "validation_metadata_path")
                if getattr(c.data, n) is not None]
    yield (c.data.validation_share is not None and len(held_out) > 1,
           f"validation_share={c.data.validation_share} and {listing(held_out[1:])} are both set: hold out a "
           "share of the images, or give other images.")
    yield (c.run.validation_steps is not None and not held_out and stage != "train",
           f"validation_steps={c.run.validation_steps} without images that are held out: set validation_share, for "
           "example to 0.1, or validation_base_path.")
    yield (bool(held_out) and c.run.validation_steps is None and not stage,
           f"{listing(held_out)} would not be used: set validation_steps, for example to 100.")
    yield (c.run.sample_template_inputs is not None and c.model.template_model_id_or_path is None,
           "sample_template_inputs without a template: set template_model_id_or_path, or remove it.")
    yield (c.run.evaluation_steps is not None and stage == "train" and c.run.evaluation_reference is None,
           f"evaluation_steps={c.run.evaluation_steps} with task={c.objective.task}, whose data set is a cache: say "
           "what images are compared with, by evaluation_reference, a folder.")
    yield (c.model.use_gradient_checkpointing_offload and c.run.mode == "graph",
           "use_gradient_checkpointing_offload=true in mode graph: MindSpore cannot move what a compiled step keeps to "
           "the host. Expected --mode pynative, or use_gradient_checkpointing without offload.")
    unknown = [name for name in c.run.trackers if name not in TRACKERS]
    yield (bool(unknown), f"trackers={','.join(c.run.trackers)} names {listing(unknown)}: expected some of "
           f"{listing(TRACKERS)}.{nearest(unknown[0], TRACKERS) if unknown else ''}")
    yield (c.run.push_to_hub and not c.run.hub_model_id,
           "push_to_hub=true without hub_model_id: say where, for example --hub_model_id me/my-lora.")
    yield (c.run.push_to_hub and stage == "data_process",
           f"push_to_hub=true with task={c.objective.task}, which trains nothing to publish: remove it.")
    places = ["model_id_with_origin_paths", "template_model_id_or_path", *(n for n in SETTINGS if n[:9] == "tokenizer")]
    is_source = any(getattr(c.model, n) for n in places)  # hub: models come from it too
    unsent = [n for n in ("hub_model_id", "hub_private_repo", "hub") if getattr(c.run, n) != SETTINGS[n].default
              and not (n == "hub" and is_source)]
    yield bool(unsent) and not c.run.push_to_hub, f"{listing(unsent)} would not be used: set push_to_hub=true."
    trusted = [n for n in ("trust_template_code", "trust_template_sha256") if getattr(c.model, n)]
    yield (bool(trusted) and c.model.template_model_id_or_path is None,
           f"{listing(trusted)} would not be used: set template_model_id_or_path, or remove it.")
    yield (c.run.evaluation_reference is not None and c.run.evaluation_steps is None,
           "evaluation_reference would not be used: set evaluation_steps, for example to 100.")
    yield (c.run.resume not in ("none", "auto") and stage == "data_process",
           f"resume={c.run.resume} with task={c.objective.task}: remove it; a cache is always completed.")
    yield (bool(c.run.accept_changes) and c.run.resume == "none",
           f"accept_changes={','.join(c.run.accept_changes)} would not be used: set resume, for example --resume auto.")
