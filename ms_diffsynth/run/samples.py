"""The sample images or videos of a run: with what each is made, which prompts that takes, and what makes them."""
from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ms_diffsynth.config import SAMPLE_OVERRIDES, TrainConfig, prompts_of
from ms_diffsynth.data.buckets import nearest_bucket, own_bucket
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.images import image_size, read_image
from ms_diffsynth.errors import CacheError, ConfigError, DataError, WeightError, listing, naming, shortened
from ms_diffsynth.formats.json_text import NotJSON, parse_json
from ms_diffsynth.launch.worker import still
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.pipelines.shared.edit import references
from ms_diffsynth.run.pipeline import most_pixels
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.template.units import trained_template_cache
from ms_diffsynth.training.two_stage import stage_of

logger = logging.getLogger(__name__)

Sampler = Callable[..., list[Image.Image | np.ndarray]]


def planned_samples(config: TrainConfig, pipe: Pipeline,
                    usual: tuple[int | None, int | None] = (None, None)) -> list[dict[str, Any]]:
    """The arguments of the call of ``pipe`` that makes each sample image, in the order of ``sample_prompts``.

    An entry of ``sample_prompts`` that is a mapping overrides the settings ``sample_...`` for its own image.

    Args:
        usual: height and width where no setting says them, in pixels.

    Raises: ConfigError for guidance that the model does not take, or a negative prompt that nothing would read.
    """
    run = config.run
    same = {name: getattr(run, setting) for name, setting in SAMPLE_OVERRIDES.items()}
    same |= {"height": run.sample_height or config.data.height or usual[0],
             "width": run.sample_width or config.data.width or usual[1]}
    if pipe.medium == "video":
        same["num_frames"] = run.sample_num_frames or max(map(int, config.data.num_frames), default=None)
    else:
        same.pop("num_frames")
    planned = []
    for k, entry in enumerate(run.sample_prompts):
        own = {"prompt": entry} if isinstance(entry, str) else dict(entry)
        image = same | {"seed": run.sample_seed + k} | own
        image["embedded_guidance"] = image.pop("guidance")
        if "num_frames" in image and "num_frames" not in same:
            raise ConfigError(f"sample_prompts: num_frames={image['num_frames']}, but the family {config.model.family} "
                              "makes images. Remove it.")
        name = f"the sample {pipe.medium} of {shortened(image['prompt'], 60)!r}"
        if image["embedded_guidance"] is not None and not pipe.takes_guidance:
            raise ConfigError(f"guidance {image['embedded_guidance']} for {name}: this model is told none. Remove "
                              "sample_guidance, or set sample_cfg_scale.")
        if image["negative_prompt"] and _cfg_scale(image, pipe) == 1:
            raise ConfigError(f"negative prompt {shortened(image['negative_prompt'], 60)!r} for {name}, with a "
                              "cfg_scale of 1, which reads none. Set sample_cfg_scale, for example to 4, or remove "
                              "the negative prompt.")
        image["negative_prompt"] = image["negative_prompt"] or None
        pipe.check_sampler(image["sampler"])
        planned.append(image)
    return planned


def prompts_to_prepare(config: TrainConfig, pipe: Pipeline) -> list[str]:
    """The prompts of which stage one of split training keeps the embeddings for stage two: those of sample images, and
    the empty one of caption dropout.
    """
    is_dropped = config.data.caption_dropout is not None and "prompt" in pipe.inputs
    return list(dict.fromkeys([*_sampled_prompts(config, pipe), *([""] if is_dropped else [])]))


def _sampled_prompts(config: TrainConfig, pipe: Pipeline) -> list[str]:
    """What sample images are made of, negative prompts too."""
    planned = planned_samples(config, pipe) if config.run.sample_prompts and "prompt" in pipe.inputs else []
    negative = [image["negative_prompt"] or "" for image in planned if _cfg_scale(image, pipe) != 1
                and (image["negative_prompt"] or not pipe.zeroed_slots)]
    return list(dict.fromkeys([*(image["prompt"] for image in planned), *negative]))


def check_prompts(config: TrainConfig, pipe: Pipeline, folder: str) -> None:
    """Refuse to make sample images of prompts that a cache does not have. Raises: CacheError with the command that adds
    them; WeightError where no files of the VAE are given.
    """
    if "prompt" not in pipe.inputs or not config.run.sample_prompts:
        return
    for name in pipe.build_decode().onload_model_names:
        with naming("sample_prompts", WeightError):
            pipe.store.source(name)
    there = Cache(folder).prompts
    lost = [prompt for prompt in _sampled_prompts(config, pipe) if prompt not in there]
    if lost:
        prompts = json.dumps(list(config.run.sample_prompts), ensure_ascii=False)
        kind = config.objective.task.partition(":")[0]
        raise CacheError(
            f"the cache in {folder} lacks the sample {'prompt' if len(lost) == 1 else 'prompts'} "
            f"{listing((repr(shortened(prompt, 60)) for prompt in lost), 5)}, and stage two loads no text encoder. "
            "Expected prompts that stage one has encoded. Add them, with the settings of stage one: ms-diffsynth train "
            f"CONFIG.yaml --task {kind}:data_process --output_path {shlex.quote(str(folder))} --sample_prompts "
            f"{shlex.quote(prompts)}; or remove them, by --sample_prompts '[]'.")


def check_sample_files(config: TrainConfig) -> None:
    """Refuse reference images, control images and masks of sample images that are no images. Raises: ConfigError."""
    wrong = []
    for setting in ("sample_edit_images", "sample_control_images", "sample_control_masks"):
        for file in dict.fromkeys(file for names in getattr(config.run, setting) for file in _files(names)):
            try:
                image_size(file)
            except DataError as error:
                wrong.append(f"{setting}: {error}.")
    if wrong:
        head = "" if len(wrong) == 1 else f"{len(wrong)} files of sample images cannot be used:\n  "
        raise ConfigError(head + "\n  ".join(wrong[:10]))


def _files(names: str) -> list[str]:
    """Those of one sample image, which semicolons join."""
    return [name.strip() for name in names.split(";") if name.strip()]


def sample_references(config: TrainConfig, pipe: Pipeline, dataset: Any = None) -> list[list[Image.Image]]:
    """The reference images of each sample image: as set, or those of the first rows of ``dataset`` that have any, where
    the run trains on references. Empty for none.

    Raises: ConfigError for a family that takes none; DataError for a file that is not an image.
    """
    run, count = config.run, len(config.run.sample_prompts)
    if run.sample_edit_images and "edit_image" not in pipe.optional_units:
        raise ConfigError(f"sample_edit_images={','.join(run.sample_edit_images)}: the family {config.model.family} "
                          "takes no reference images. Remove it.")
    if not count:
        return []
    if run.sample_edit_images:
        with naming("sample_edit_images"):
            each = [[read_image(name) for name in _files(names)] for names in run.sample_edit_images]
        return each * count if len(each) == 1 else each
    if "edit_image" not in pipe.inputs:
        return []
    if stage_of(config.objective.task) == "train" or not isinstance(dataset, UnifiedDataset):
        logger.warning("sample images have no references: this stage reads no data set. Name some by "
                       "sample_edit_images.")
        return []
    rows = [row for row, cells in enumerate(dataset.rows) if cells.get("edit_image")][:count]
    if rows:
        names = [dataset.rows[row].get(dataset.medium) or f"row {row + 1}" for row in rows]
        logger.info("sample images have the references of the rows %s; others are named by sample_edit_images.",
                    listing(names, 3))
    found = [references(dataset.cells(row, ["edit_image"])["edit_image"]) for row in rows]
    return list(itertools.islice(itertools.cycle(found), count)) if found else []


def sample_controls(config: TrainConfig, pipe: Pipeline, dataset: Any = None) -> list[dict[str, Any]]:
    """The further inputs of each sample image that are control images and masks: as set, or those of the first rows of
    ``dataset``, where the run trains on them. Empty for none.

    Raises: ConfigError for a family that takes none; DataError for a file that is not an image.
    """
    run, count = config.run, len(config.run.sample_prompts)
    given = {"control_image": ("sample_control_images", run.sample_control_images),
             "control_mask": ("sample_control_masks", run.sample_control_masks)}
    for setting, names in given.values():
        if names and not pipe.aligned_inputs:
            raise ConfigError(f"{setting}={','.join(names)}: the family {config.model.family} takes no control images. "
                              "Remove it.")
    trained = [name for name in pipe.aligned_inputs if name in pipe.inputs]
    if not count or not (trained or any(names for _, names in given.values())):
        return []
    rows = dataset.rows if isinstance(dataset, UnifiedDataset) and stage_of(config.objective.task) != "train" else []
    if trained and not rows and not any(names for _, names in given.values()):
        logger.warning("no sample images are made: this stage reads no data set, and sample_control_images names none.")
        return []
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, (setting, names) in given.items():
        for k, inputs in enumerate(found):
            if names:
                with naming(setting):
                    inputs[name] = [read_image(file) for file in _files(names[0 if len(names) == 1 else k])]
            elif rows and (name in trained or (name == "control_image" and trained)):
                column = name if name in trained else "image"  # the image itself has the hole
                inputs[name] = dataset.cells(k % len(rows), [column])[column]
            if name == "control_mask" and isinstance(inputs.get(name), list):
                inputs[name] = inputs[name][0]
    return found


def shown(inputs: Mapping[str, Any]) -> list[Image.Image]:
    """The images of such inputs in a row, to be shown beside the sample image."""
    return [image for value in inputs.values() for image in (value if isinstance(value, list) else [value])]


def build_sampler(config: TrainConfig, pipe: Pipeline, dataset: Any = None,
                  edited: Sequence[Sequence[Image.Image]] | None = None,
                  controls: Sequence[Mapping[str, Any]] | None = None) -> tuple[Sampler | None, list[str]]:
    """``sampler()`` makes one image a prompt, always from the same seeds; and the prompts. None without prompts.

    Without sample_height and height it makes them at the size of most images of ``dataset``, in stage two of those of
    the cache, or square.

    Each has the reference images ``edited`` and the control images ``controls``; None takes those of
    `sample_references` and `sample_controls`.

    ``sampler(count)`` makes this many, with the prompts in turn. For a family without prompts, ``sampler()`` makes
    ``sample_count`` images.

    Raises: ConfigError as `planned_samples`.
    """
    run = config.run
    if "prompt" not in pipe.inputs:
        size, how = run.sample_count, {"num_inference_steps": run.num_inference_steps, "sampler": run.sampler}
        pipe.check_sampler(run.sampler)

        def sampler(count: int = size) -> list[Image.Image | np.ndarray]:
            images = []
            for k in range(-(-count // size)):  # groups of one size, for which the network is compiled once
                still()
                images += pipe(batch_size=size, seed=run.sample_seed + k, height=run.sample_height,
                               width=run.sample_width, **how)
            return images[:count]

        return sampler if size else None, []
    if not run.sample_prompts:
        return None, []
    planned = planned_samples(config, pipe, _usual_size(config, pipe, dataset))
    inputs = sample_template_inputs(config)
    edited = sample_references(config, pipe, dataset) if edited is None else edited
    controls = sample_controls(config, pipe, dataset) if controls is None else controls
    if not controls and set(pipe.aligned_inputs) & set(pipe.inputs):
        return None, []

    def sampler(count: int = len(planned)) -> list[Image.Image | np.ndarray]:
        with contextlib.nullcontext() if config.model.preset_lora_in_samples else pipe.without_loras():
            return make(count)

    def make(count: int) -> list[Image.Image | np.ndarray]:
        caches = [trained_template_cache(pipe, given) for given in inputs] if inputs else [None] * len(planned)
        images = []
        for k in range(count):
            still()
            image, cache = planned[k % len(planned)], caches[k % len(planned)]
            seed = image["seed"] + k - k % len(planned)  # other images of the same prompts have other seeds
            further = {"template_cache": cache} if cache else {}
            further |= {"edit_image": list(edited[k % len(planned)])} if edited else {}
            further |= controls[k % len(planned)] if controls else {}
            images.append(pipe(**{**image, "seed": seed}, **further))
        return images

    return sampler, prompts_of(run.sample_prompts)


def sample_template_inputs(config: TrainConfig) -> list[Mapping[str, Any]]:
    """Template inputs of each sample image; empty for none. Raises: ConfigError."""
    text, count, given = config.run.sample_template_inputs, len(config.run.sample_prompts), None
    if not text:
        return []
    with contextlib.suppress(NotJSON):
        given = parse_json(text, None)
    inputs = [given] * count if isinstance(given, dict) else given
    if not isinstance(inputs, list) or len(inputs) != count or not all(isinstance(item, dict) for item in inputs):
        raise ConfigError(f"sample_template_inputs={shortened(text)}: expected a JSON object such as "
                          f"{{\"scale\": 0.5}}, or a list of {count}, one for each of sample_prompts.")
    return inputs


def _usual_size(config: TrainConfig, pipe: Pipeline, dataset: Any) -> tuple[int, ...]:
    """(height, width) of most images that are trained on, or of a square of the model's size, in pixels."""
    most = most_pixels(config, pipe)
    usual = own_bucket(math.isqrt(most), math.isqrt(most), most, pipe.division_factor)
    sizes: Iterable[tuple[int, ...]] = ()
    if stage_of(config.objective.task) == "train":
        cache = Cache(config.data.cache_dir or config.data.dataset_base_path)
        sizes = (cache.kind(row.key).size[-2:] for row in cache.rows("instance"))
    elif buckets := getattr(dataset, "buckets", ()):
        found = (nearest_bucket(*dataset.image_size(row), buckets) for row in range(len(dataset.rows)))
        sizes = ((bucket.height, bucket.width) for bucket in found)
    return next(iter(Counter(sizes).most_common(1)), ((usual.height, usual.width), 0))[0]


def _cfg_scale(image: Mapping[str, Any], pipe: Pipeline) -> float:
    return pipe.sampling.cfg_scale if image["cfg_scale"] is None else image["cfg_scale"]
