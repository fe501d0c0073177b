"""A family's pipeline on given files: for a configured run, and for sampling, which imports nothing of training."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ms_diffsynth import runtime
from ms_diffsynth.config import SETTINGS, TrainConfig
from ms_diffsynth.data.paths import path_problem
from ms_diffsynth.errors import ConfigError, listing, naming, shortened
from ms_diffsynth.formats.json_text import NotJSON, parse_json, shown
from ms_diffsynth.hub.bundled import bundled
from ms_diffsynth.hub.download import SOURCES, ModelConfig, parse_model_id_with_origin_paths, parse_path_or_model_id
from ms_diffsynth.models import sampling_config
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import family

NEW = "new"  # a ControlNet that is made of the network


def build_pipeline(config: TrainConfig) -> Pipeline:
    """The family's pipeline on the configured weights, which are loaded when they are first used.

    Raises: ConfigError for files, a tokenizer or a setting that the family does not have.
    """
    model = config.model
    given = [f"{name}={value}" for name in ("model_paths", "model_id_with_origin_paths")
             if (value := getattr(model, name))]
    with naming(", ".join(given) or "model_paths"):
        return open_pipeline(
            model.family, model_configs(model.model_paths, model.model_id_with_origin_paths, source_of(config)),
            tokenizers={name: getattr(model, name) for name in SETTINGS if name.startswith("tokenizer")},
            device=config.run.device, dtype=config.run.dtype, max_sequence_length=config.data.max_sequence_length,
            edit_max_pixels=config.data.edit_max_pixels, edit_template=config.data.edit_template,
            expert=model.expert, control_mode=config.data.control_mode, hub=source_of(config),
            **controlnet_settings(config))


def controlnet_settings(config: TrainConfig) -> dict[str, Any]:
    """What a run says of its ControlNet, as arguments of `open_pipeline`."""
    return {"controlnet": config.model.controlnet,
            "controlnet_layers": (config.model.controlnet_layers, config.model.controlnet_single_layers),
            "fills_holes": "control_mask" in (config.data.extra_inputs or "")}


def source_of(config: TrainConfig) -> str | None:
    """The hub that a run's models come from where their names do not say it; None leaves that to the environment."""
    return None if config.run.hub == SOURCES[0] else config.run.hub


def open_pipeline(name: str, models: Any, *, tokenizers: Mapping[str, str | None] | None = None,
                  device: str | None = None, dtype: str | None = None,
                  max_sequence_length: int | None = None, edit_max_pixels: int | None = None,
                  edit_template: str | None = None, expert: str | None = None, controlnet: str | None = None,
                  controlnet_layers: Sequence[int | None] = (), fills_holes: bool = False,
                  control_mode: int | None = None, hub: str | None = None) -> Pipeline:
    """The pipeline of the family called ``name``.

    Args:
        models: what `Pipeline.from_pretrained` takes: a folder, or a list of `ModelConfig`.
        tokenizers: ``<tokenizer>_path`` -> a folder, or ``owner/name:folder/``; None leaves the family's own.
        max_sequence_length: text tokens a prompt is padded or cut to; None leaves the family's number.
        edit_max_pixels: most pixels of a reference image; None leaves the family's number.
        edit_template: how the text encoder is shown reference images; None goes by the model.
        expert: which noise levels the network is trained on; None goes by the model.
        controlnet: a folder, ``owner/name:`` on a hub, or "new" for one of the network's first blocks.
        controlnet_layers: of a new one, see `shared.control.TakesControl.new_controlnet`.
        fills_holes: whether a new one reads a mask.
        control_mode: which kind of control images a union of ControlNets is told.
        hub: of tokenizers whose names do not say it.

    Raises: ConfigError for a tokenizer the family does not have, or a length where prompts have a fixed one.
    """
    chosen, configs = family(name), {}
    for setting, text in (tokenizers or {}).items():
        tokenizer = setting.removesuffix("_path")
        if text and tokenizer not in chosen.tokenizers:
            raise ConfigError(f"{setting}={text}: {chosen.pipeline.__name__} has no {tokenizer}; it has "
                              f"{listing(chosen.tokenizers) or 'none at all'}. Remove the setting.")
        if text:
            with naming(f"{setting}={text}"):
                configs[f"{tokenizer}_config"] = parse_path_or_model_id(text, hub=hub)
    pipe = chosen.pipeline.from_pretrained(models, **configs, device=device,
                                           mindspore_dtype=runtime.compute_dtype(dtype))
    use_settings(pipe, name, max_sequence_length=max_sequence_length, edit_max_pixels=edit_max_pixels,
                 edit_template=edit_template, expert=expert)
    if controlnet is not None:
        attach_controlnet(pipe, name, controlnet, controlnet_layers, fills_holes, hub)
    if control_mode is not None:
        modes = pipe.config("controlnet").get("num_mode") if "controlnet" in pipe.model_names else None
        if not modes or control_mode >= modes:
            raise ConfigError(f"control_mode={control_mode}: expected a number below {modes}." if modes else
                              f"control_mode={control_mode}: this model has no union of ControlNets. Remove it.")
        pipe.control_mode = control_mode
    return pipe


def use_settings(pipe: Pipeline, name: str, *, max_sequence_length: int | None = None,
                 edit_max_pixels: int | None = None, edit_template: str | None = None,
                 expert: str | None = None) -> None:
    """Set what `open_pipeline` is told of a pipeline of the family called ``name``. Raises: ConfigError where the
    family has no such thing."""
    if max_sequence_length is not None:
        if not hasattr(pipe, "max_sequence_length"):
            raise ConfigError(f"max_sequence_length={max_sequence_length}: prompts of the family {name} have one fixed "
                              "length. Remove it.")
        pipe.max_sequence_length = max_sequence_length
    if edit_max_pixels is not None:
        if "edit_image" not in pipe.optional_units:
            raise ConfigError(f"edit_max_pixels={edit_max_pixels}: the family {name} takes no reference images. Remove "
                              "it.")
        pipe.edit_max_pixels = edit_max_pixels
    if edit_template is not None:
        if not hasattr(pipe, "edit_template"):
            raise ConfigError(f"edit_template={edit_template}: the text encoder of the family {name} sees no images. "
                              "Remove it.")
        pipe.edit_template = edit_template
    if expert is not None:
        if not hasattr(pipe, "expert"):
            raise ConfigError(f"expert={expert}: the family {name} has one network for all noise levels. Remove it.")
        pipe.expert = expert


def attach_controlnet(pipe: Pipeline, name: str, controlnet: str, controlnet_layers: Sequence[int | None] = (),
                      fills_holes: bool = False, hub: str | None = None) -> None:
    """Give a pipeline of the family called ``name`` a ControlNet; the arguments are those of `open_pipeline`.

    Raises: ConfigError for a family that has none, or a new one that cannot be; WeightError for another model.
    """
    if not any(component.name == "controlnet" for component in pipe.store.further):
        raise ConfigError(f"controlnet={controlnet}: the family {name} has no ControlNet here. Remove it.")
    with naming(f"controlnet={controlnet}"):
        if controlnet != NEW:
            pipe.store.add(parse_path_or_model_id(controlnet, hub=hub), pipe.network)
            if "controlnet" not in pipe.model_names:
                raise ConfigError("there is another model: expected the folder of a ControlNet.")
            return
        known = len(pipe.controlnet_lists)
        if odd := [count for count in controlnet_layers[known:] if count is not None]:
            raise ConfigError(f"controlnet_single_layers={odd[0]}: the ControlNet of the family {name} has blocks of "
                              "one kind. Set controlnet_layers alone.")
        mask_channels = pipe.latent_patch**2 if fills_holes else 0
        pipe.new_controlnet(controlnet_layers[:known], mask_channels)


def most_pixels(config: TrainConfig, pipe: Pipeline | None = None) -> int:
    """Of an image in dynamic resolution: as set, or the model's own size, or that of most models: 1024 x 1024. Of a
    video: as set, or the size that the model is sampled at, so far as ``pipe`` knows it, or else the family.
    """
    if config.data.max_pixels:
        return config.data.max_pixels
    folder = config.model.model_paths or ""
    own = sampling_config(bundled(folder) or Path(folder)) if folder and not folder.lstrip().startswith("[") else {}
    if {"height", "width"} <= set(own):
        return own["height"] * own["width"]
    cls = family(config.model.family).pipeline
    usual = (pipe or cls).sampling
    return usual.height * usual.width if cls.medium == "video" else 1024 * 1024


def model_configs(model_paths: str | None, model_id_with_origin_paths: str | None,
                  hub: str | None = None) -> list[ModelConfig]:
    """The files of the settings ``model_paths`` (a path, or a JSON list) and ``model_id_with_origin_paths``.

    Args:
        hub: of names that do not say it.

    Raises: ConfigError when neither names a file.
    """
    paths: list[Any] = []
    if model_paths:
        try:
            paths = parse_json(model_paths, list) if model_paths.lstrip().startswith("[") else [model_paths]
        except NotJSON as error:
            raise ConfigError(f"model_paths={shortened(model_paths)} {error}: expected a path, or a JSON list of "
                              "paths.") from None
    for path in paths:  # one model may be several files, a list in the list
        names = path if isinstance(path, list) else [path]
        wrong = [problem for name in names for problem in [
            path_problem(name) if isinstance(name, str) and name else "expected a path"] if problem]
        if wrong or not names:
            raise ConfigError(f"model_paths={shortened(str(model_paths))}: {shown(path)} names no file: "
                              f"{listing(wrong) or 'expected a path'}. Give a path, or a JSON list of paths.")
    configs = [ModelConfig(path) for path in paths]
    if model_id_with_origin_paths:
        configs += parse_model_id_with_origin_paths(model_id_with_origin_paths, hub)
    if not configs:
        raise ConfigError("neither model_paths nor model_id_with_origin_paths is set: name the folder of a "
                          "diffusers-format model, or files on a hub.")
    return configs
