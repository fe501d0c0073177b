"""A pipeline of which no weights are loaded, with the settings of its models so far as they are known anywhere."""
from __future__ import annotations

import os
from dataclasses import replace
from pathlib import PurePosixPath

import mindspore as ms

from ms_diffsynth import runtime
from ms_diffsynth.config import TrainConfig
from ms_diffsynth.errors import HubError, WeightError
from ms_diffsynth.hub.download import ModelConfig, parse_path_or_model_id
from ms_diffsynth.models import Source, read_config
from ms_diffsynth.pipeline import Family, Pipeline
from ms_diffsynth.registry import family
from ms_diffsynth.run.pipeline import (
    NEW,
    attach_controlnet,
    controlnet_settings,
    model_configs,
    source_of,
    use_settings,
)


def skeleton(config: TrainConfig, dtype: ms.Type) -> tuple[Pipeline, list[str]]:
    """The family's pipeline, no weights loaded, and the files of which nothing is known.

    Settings of models are those of their files where they are here; else as published; else their config.json, a few
    kB, is fetched from the hub.
    """
    chosen, unknown = family(config.model.family), []
    pipe = chosen.pipeline(dtype=dtype)
    for model in model_configs(config.model.model_paths, config.model.model_id_with_origin_paths,
                               source_of(config)):
        if not _add_files(pipe, model) and not _add_settings(pipe, model, chosen):
            unknown.append(str(model))
    if config.model.controlnet and not _add_controlnet(pipe, config):
        unknown.append(config.model.controlnet)
    pipe.use_sampling_config(pipe.store.sampling_config)
    use_settings(pipe, config.model.family, max_sequence_length=config.data.max_sequence_length,
                 edit_max_pixels=config.data.edit_max_pixels, edit_template=config.data.edit_template,
                 expert=config.model.expert)
    for name in chosen.tokenizers:
        if text := getattr(config.model, f"{name}_path"):
            _add_tokenizer(pipe, name, text, source_of(config))
    return pipe, unknown


def _add_files(pipe: Pipeline, model: ModelConfig) -> bool:
    """Take what is on this machine. Nothing is asked of a hub."""
    if model.path is not None:
        pipe.store.add(model, pipe.network)
        return True
    try:
        pipe.store.add(replace(model, skip_download=True), pipe.network)
        return True
    except (HubError, WeightError):  # not here, or not all of it
        return False


def _add_settings(pipe: Pipeline, model: ModelConfig, chosen: Family) -> bool:
    """Take the settings of a published model, or the hub's config.json."""
    folder = PurePosixPath(model.origin_file_pattern or "").parent.name
    published = chosen.published.get(chosen.repositories.get(model.model_id, ""), {})
    for components in (pipe.store.components, *pipe.store.variants):
        name = next((c.name for c in components if c.folder == folder and not c.is_tokenizer), None)
        if name is None:
            continue
        pipe.given_as[f"{model.model_id}:{model.origin_file_pattern}"] = name
        known = published.get(name)
        if known is None:
            try:
                file = replace(model, origin_file_pattern=f"{folder}/config.json").resolve(runtime.model_base_path())
                known = read_config(file[0].parent)
            except (HubError, WeightError):
                return False
        pipe.store.know({name: known})
        return True
    return False


def _add_controlnet(pipe: Pipeline, config: TrainConfig) -> bool:
    """Take its config.json, of a hub too. False where that cannot be had."""
    name = config.model.controlnet
    if name == NEW or os.path.exists(name):
        attach_controlnet(pipe, config.model.family, **controlnet_settings(config), hub=source_of(config))
        return True
    model = parse_path_or_model_id(name, hub=source_of(config))
    try:
        file = replace(model, origin_file_pattern="config.json").resolve(runtime.model_base_path())
        pipe.store.know({"controlnet": read_config(file[0].parent)})
        return True
    except (HubError, WeightError):
        return False


def _add_tokenizer(pipe: Pipeline, name: str, text: str, hub: str | None) -> None:
    try:
        paths = replace(parse_path_or_model_id(text, hub=hub), skip_download=True).resolve(runtime.model_base_path())
    except HubError:  # it is on the hub, so prompts cannot be counted
        pipe.sources.pop(name, None)
        return
    pipe.sources[name] = Source(paths[0] if paths[0].is_dir() else paths[0].parent)
