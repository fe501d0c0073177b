"""What a run takes, before anything is downloaded or loaded: `plan_run` works it out from settings, data and shapes.

No model is read and no device is used: a configuration for an Ascend is planned on any machine.
"""
from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from ms_diffsynth import runtime
from ms_diffsynth.config import SECTIONS, SETTINGS, TrainConfig, validate
from ms_diffsynth.config.yaml_lines import Written
from ms_diffsynth.data.buckets import own_bucket
from ms_diffsynth.data.loader import Loader
from ms_diffsynth.errors import ConfigError, UserError
from ms_diffsynth.pipeline import Family, Pipeline, padded_to
from ms_diffsynth.pipelines.shared.cuts import Cuts
from ms_diffsynth.pipelines.shared.edit import size_within
from ms_diffsynth.program import Cut, slot
from ms_diffsynth.registry import family
from ms_diffsynth.run.build import DataSets, build_module, clips_of
from ms_diffsynth.run.checks import check_films
from ms_diffsynth.run.memory import (
    GIB,
    RESERVED,
    Stage,
    Trained,
    Work,
    in_8bit,
    network_of,
    optimizer_bytes,
    stages_of,
    trained_of,
)
from ms_diffsynth.run.pipeline import most_pixels
from ms_diffsynth.run.samples import check_sample_files
from ms_diffsynth.run.skeleton import skeleton
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.prepared import PreparedRows
from ms_diffsynth.training.trainer import steps_in
from ms_diffsynth.training.two_stage import stage_of

CARD = 64  # GB of an Ascend 910B, where nothing else is said
MOST_TEXTS = 2000  # prompts whose tokens are counted: tokenizers take about a millisecond each
SMALLER = (768, 512)  # sides in pixels of images that are tried where those of the run do not fit
AROUND = 7  # tokens that a template puts around a picture

References = tuple[tuple[int, int], ...]  # height and width of the reference images of a row, as they are


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What is written: ``what`` it is, bytes, and where."""

    what: str
    bytes: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the data tell.

    Attributes:
        sizes: height and width at which images are trained, of videos with the frames in front -> how many.
        compilations: of the training step; None where only preparing the images can tell.
        lengths: tokens of prompts, where they are padded to one of several lengths.
        cuts: what prompts are cut to -> one that is. looked_at: prompts whose tokens were counted; 0 where their
            tokenizer is not here.
        references: the reference images of a row -> how many rows have such; empty where none are trained on.
        batches: in an epoch.
    """

    rows: int
    classes: int = 0
    held_out: int = 0
    texts: int = 0
    sizes: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    compilations: int | None = None
    lengths: Sequence[int] = ()
    cuts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    looked_at: int = 0
    references: Mapping[References, int] = field(default_factory=dict)
    batches: int = 0


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Settings with which a run fits, each as it is typed behind its flag; and the peak with them, bytes."""

    settings: Mapping[str, str]
    peak: int


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will take.

    Attributes:
        device: it is planned for. total, limit: bytes of its memory, and what of them a run can have.
        files: of a hub that it needs; see `hub_files`.
        network: parameters of the network; None where it is not known.
        steps: None of a stage that trains nothing. epochs: that they are.
        not_known: models whose sizes nobody can tell here.
    """

    config: TrainConfig
    pipe: Pipeline
    cut: Cut
    device: str
    total: int
    limit: int
    data: Data | None
    work: Work
    trained: Trained
    network: int | None
    stages: Sequence[Stage]
    steps: int | None
    epochs: float
    disk: Sequence[Disk]
    not_known: Sequence[str]

    @property
    def peak(self) -> int:
        """Bytes at the peak of the largest stage."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def plan_run(config: TrainConfig, sets: DataSets | None = None, card: float = CARD, is_short: bool = False) -> RunPlan:
    """Plan a run.

    Args:
        sets: its data, as `run.build.build_datasets` reads them; None plans without them.
        card: GB of the Ascend it is for.
        is_short: leave out what `short_form` does not tell: how prompts are cut, and a template, whose code would run.

    Raises: ConfigError for models, layers or sample files that are not there, DataError, WeightError for a damaged
    config.json.
    """
    if is_short:
        config = replace(config, model=replace(config.model, trust_template_code=False, trust_template_sha256=None))
    if stage_of(config.objective.task) != "data_process":  # which makes no sample images
        check_sample_files(config)
    device = planned_device(config)
    pipe, not_known = skeleton(config, planned_dtype(config))
    cut, module = cut_of(config, pipe)
    if sets is not None and pipe.medium == "video" and stage_of(config.objective.task) != "train":
        check_films(pipe, sets, pipe.inputs)
    data = None if sets is None else data_of(config, sets, module, cut, is_short)
    total, limit = memory_of(config, device, card)
    trained, work = trained_of(config, pipe), _work(config, pipe, data, device)
    steps, epochs = _steps(config, data)
    network = network_of(pipe, pipe.network)
    return RunPlan(config=config, pipe=pipe, cut=cut, device=device, total=total, limit=limit, data=data, work=work,
                   trained=trained, network=network and network.count, stages=stages_of(config, pipe, cut, work),
                   steps=steps, epochs=epochs, disk=list(_disk(config, pipe, cut, data, trained, steps, epochs)),
                   not_known=not_known)


# -- the pipeline without its weights ----------------------------------------------------------------------------------


def planned_device(config: TrainConfig) -> str:
    """The configured device, or the one that training would take here."""
    return config.run.device or ms.get_context("device_target")


def planned_dtype(config: TrainConfig) -> ms.Type:
    """What is computed in on that device."""
    return ms.float32 if planned_device(config) == "CPU" else runtime.DTYPES[config.run.dtype or "bfloat16"]


def memory_of(config: TrainConfig, device: str, card: float) -> tuple[int, int]:
    """Bytes of the device's memory, and what of them a run can have."""
    if device == "CPU":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total = round(card * 10**9)
    most = config.run.device_memory
    return total, min(total - RESERVED, total if most is None else round(most * GIB))


def cut_of(config: TrainConfig, pipe: Pipeline) -> tuple[Cut, DiffusionTrainingModule]:
    """How the run is cut in two, and its module. The code of a template is run only where that has been allowed."""
    model, data = config.model, config.data
    extra = [n for n in (data.extra_inputs or "").split(",") if n.strip()]
    is_trusted = model.trust_template_code or model.trust_template_sha256
    if model.template_model_id_or_path and not is_trusted:
        extra = [n for n in extra if n.strip() != "template_inputs"]
        model = replace(model, template_model_id_or_path=None)
        if "template_model" in (model.trainable_models or ""):
            model = replace(model, trainable_models=None, lora_base_model=pipe.network)
    model = replace(model, fp8_models=None, weights=None, preset_lora_path=None)
    data = replace(data, extra_inputs=",".join(extra) or None)
    kind = config.objective.task.partition(":")[0]
    module = build_module(replace(config, model=model, data=data), pipe, f"{kind}:data_process")
    return module.training_cut(), module


# -- data --------------------------------------------------------------------------------------------------------------


def data_of(config: TrainConfig, sets: DataSets, module: DiffusionTrainingModule, cut: Cut, is_short: bool) -> Data:
    """What data sets tell of a run, images unread."""
    pipe, batch, images = module.pipe, config.run.batch_size, sets.instance
    if stage_of(config.objective.task) == "train":
        return _cached_data(config)
    rows = PreparedRows(images, module, cut)
    of_classes = PreparedRows(sets.classes, module, cut).bucket_of if sets.classes else None
    edits = _references(pipe, images)
    sees = edits if edits and pipe.picture_sides(edits[0] or ((64, 64),)) else [()] * len(images.rows)
    texts = [(row.get("prompt"), seen) for row, seen in zip(images.rows, sees)]
    prompts = [text for text in dict.fromkeys(texts) if isinstance(text[0], str)]
    lengths, cuts, looked_at = (_tokens(module, cut, prompts) if rows.has_lengths or not is_short else ({}, {}, 0))
    sizes: Counter = Counter(images.size_of(row) for row in range(len(images.rows)))
    sizes.update(sets.classes.size_of(row) for row in range(len(sets.classes.rows) if sets.classes else 0))
    bucket_of, batches, compilations = None, -(-len(images) // batch), None
    if not rows.has_lengths or looked_at == len(prompts):
        if rows.foresees_buckets:
            bucket_of = rows.bucket_of
        elif edits:
            padded = [padded_to(lengths[text], pipe) if rows.has_lengths else 0 for text in texts]
            bucket_of = [(images.size_of(row), _tokens_of(pipe, seen), length)
                         for row, (seen, length) in enumerate(zip(edits, padded))].__getitem__
    if bucket_of is not None:
        loader = Loader(images, batch, bucket_of=lambda item: bucket_of(images.row_of(item)),
                        class_dataset=sets.classes, class_bucket_of=of_classes)
        compilations, batches = len({bucket_of(row) for row in range(len(images.rows))}), len(loader)
    return Data(rows=len(images.rows), classes=len(sets.classes.rows) if sets.classes else 0,
                held_out=len(sets.validation.rows) if sets.validation else 0, texts=len(prompts), sizes=sizes,
                compilations=compilations, lengths=list(lengths.values()), cuts=cuts, looked_at=looked_at,
                batches=batches, references=Counter(edits))


def _cached_data(config: TrainConfig) -> Data:
    """Of a cache that stage one has written."""
    cache = Cache(config.data.cache_dir or config.data.dataset_base_path)
    rows = cache.rows("instance")
    sizes = Counter(cache.kind(row.key).size for row in rows)
    kinds = {str(cache.kind(row.key)) for row in rows}
    return Data(rows=len(rows), classes=len(cache.rows("class")), held_out=len(cache.rows("validation")), sizes=sizes,
                compilations=len(kinds), batches=-(-len(rows) // config.run.batch_size))


Text = tuple[str, References]  # a prompt, and the references that the text encoder sees with it


def _tokens(module: DiffusionTrainingModule, cut: Cut,
            texts: Sequence[Text]) -> tuple[dict[Text, int], dict[str, list[str]], int]:
    """Tokens of texts that are padded, what is cut to what, and how many texts were looked at: the longest."""
    chosen = sorted(texts, key=lambda text: -len(text[0].encode()))
    chosen = chosen[:MOST_TEXTS // 2] + chosen[MOST_TEXTS // 2:][::max(1, 2 * len(texts) // MOST_TEXTS)]
    cuts, lengths, pipe = Cuts(), {}, module.pipe
    with_pictures = [unit for unit in cut.prepare if "picture_sides" in unit.input_params]
    try:
        for prompt, seen in chosen:
            with cuts.of(" ".join(prompt.split())[:60]):
                if with_pictures:
                    slots = pipe.run(with_pictures[:1], {"prompt": prompt, "picture_sides": pipe.picture_sides(seen)})
                    length = max(slots[name].shape[1] for name in pipe.padded_slots if name in slots)
                else:
                    length = module.padded_length(prompt, cut)
                if length is not None:
                    lengths[prompt, seen] = length
    except UserError:  # its tokenizer is not here
        return {}, {}, 0
    return lengths, cuts.found, len(chosen)


def _references(pipe: Pipeline, images: Any) -> list[References]:
    """Of each row; empty where none are trained on, or their sizes are not known before they are read."""
    if "edit_image" not in pipe.inputs or "edit_image" not in images.data_file_keys:
        return []
    sizes = [images.sizes_of(row, "edit_image") for row in range(len(images.rows))]
    return [] if None in sizes else [tuple(found) for found in sizes]


def _tokens_of(pipe: Pipeline, references: References, most: int | None = None) -> int:
    """Tokens of references, each of which is made smaller until it has at most so many pixels."""
    sizes = [size_within(*size, most or pipe.edit_max_pixels, pipe.division_factor) for size in references]
    return sum(pipe.image_tokens(pipe.latent_shape(*size)) for size in sizes)


def _most_tokens(pipe: Pipeline, data: Data | None, most: int | None = None) -> int:
    """The same of the row that has the most."""
    return max((_tokens_of(pipe, seen, most) for seen in (data.references if data else ())), default=0)


def _work(config: TrainConfig, pipe: Pipeline, data: Data | None, device: str) -> Work:
    run, chosen, most = config.run, family(config.model.family), most_pixels(config, pipe)
    square = own_bucket(math.isqrt(most), math.isqrt(most), most, pipe.division_factor).size
    frames = () if (clips := clips_of(config, pipe)) is None else (max(clips.lengths),)
    sizes = dict(data.sizes) if data and data.sizes else {}
    size = frames + ((config.data.height, config.data.width) if config.data.height else square)
    size = max((s for s in sizes if s), key=math.prod, default=size)
    usual = max(sizes, key=sizes.get, default=size) or size
    prompt = _prompt_tokens(pipe, data)
    return Work(size=size, images=run.batch_size * (2 if config.objective.with_prior_preservation else 1),
                prompt=prompt, text=_text_tokens(pipe, chosen, size, prompt), further=_most_tokens(pipe, data),
                reference=max((pipe.reference_size(*size) for seen in (data.references if data else ()) for size in
                               seen), key=math.prod, default=(0, 0)),
                device=device, activations=chosen.activations, samples=models_of_samples(config, pipe),
                sample_size=(*((run.sample_num_frames or n,) if (n := frames and frames[0]) else ()),
                             run.sample_height or config.data.height or usual[-2],
                             run.sample_width or config.data.width or usual[-1]))


def _prompt_tokens(pipe: Pipeline, data: Data | None) -> int | None:
    """To how many tokens the longest prompts are padded."""
    if data and data.lengths and pipe.padded_slots:
        longest = max(data.lengths)
        return min((n for n in pipe.prompt_lengths if n >= longest), default=longest)
    most = getattr(pipe, "max_sequence_length", None)
    if data and data.references and (seen := max(_picture_tokens(pipe, seen) for seen in data.references)):
        return padded_to(most + seen, pipe)
    return most


def _picture_tokens(pipe: Pipeline, references: References) -> int:
    """Tokens that references take in the prompt."""
    return sum(rows * columns + AROUND for rows, columns in pipe.picture_sides(references))


def _text_tokens(pipe: Pipeline, chosen: Family, size: tuple[int, ...], prompt: int | None) -> int | None:
    """How many tokens of text the network sees."""
    if chosen.prepared_shapes is None or not all(pipe.store.has_config(name) for name in (pipe.network, "vae")):
        return None
    return chosen.prepared_shapes(_configs(pipe), pipe.latent_shape(*size), prompt)["prompt_embeds"][0]


def _configs(pipe: Pipeline) -> dict[str, dict[str, Any]]:
    return {c.name: pipe.store.config(c.name) for c in pipe.store.components
            if c.class_name and pipe.store.has_config(c.name)}


def models_of_samples(config: TrainConfig, pipe: Pipeline) -> tuple[str, ...]:
    """The models that sample images load, before the first step, and which stay; empty without sample images.

    In split training stage one has encoded their prompts, so no text encoder is among them, but for references that are
    encoded with the prompt. References and control images are encoded when the samples are made.
    """
    prompts = config.run.sample_prompts if "prompt" in pipe.inputs else config.run.sample_count
    stage = stage_of(config.objective.task)
    if not prompts or stage == "data_process" or (stage and "prompt" not in pipe.inputs):
        return ()
    run, is_cached = config.run, bool(stage or config.data.cache_dir)
    given = {"edit_image": run.sample_edit_images, "control_image": run.sample_control_images,
             "control_mask": run.sample_control_masks}
    shown = [name for name in getattr(pipe, "optional_units", {}) if given.get(name)
             or (name in given and name in pipe.inputs and stage != "train")]  # of the first rows
    cut = pipe.sampling_program(shown).cut(pipe.denoise.output_params)
    decode = pipe.build_decode().onload_model_names if hasattr(pipe, "build_decode") else ()
    further = [unit for name in shown for unit in pipe.optional_units[name]]
    if is_cached and not any("prompt" in map(slot, unit.input_params) for unit in further):
        encoders = [model for unit in further for model in unit.onload_model_names if model in cut.models("prepare")]
    else:
        encoders = cut.models("prepare")
    return tuple(dict.fromkeys((*encoders, *cut.models("step"), *decode)))


# -- steps and files ---------------------------------------------------------------------------------------------------


def _steps(config: TrainConfig, data: Data | None) -> tuple[int | None, float]:
    run, accumulation = config.run, config.optimizer.gradient_accumulation_steps
    if stage_of(config.objective.task) == "data_process":
        return None, 0.0
    if data is None or not data.batches:
        return run.max_train_steps, 0.0
    steps = steps_in(data.batches, run.batch_size, accumulation, run.num_epochs, run.max_train_steps)
    return steps, steps / -(-data.batches // accumulation)


def _disk(config: TrainConfig, pipe: Pipeline, cut: Cut, data: Data | None, trained: Trained, steps: int | None,
          epochs: float) -> Iterator[Disk]:
    """What will be written."""
    run, stage, n = config.run, stage_of(config.objective.task), trained.count
    cache = config.data.cache_dir if stage != "data_process" else config.data.cache_dir or run.output_path
    if cache and stage != "train" and data:
        yield Disk(what="cache", bytes=_cache_bytes(config, pipe, cut, data), folder=cache)
    if not n or steps is None:
        return
    wide = 4 if trained.is_adapter or pipe.dtype == ms.float32 else 2
    saves = math.ceil(steps / run.save_steps) if run.save_steps else max(1, math.ceil(epochs))
    kept = min(saves, run.keep_saved or saves)
    files = kept * (2 if config.optimizer.use_ema else 1)
    yield Disk(what=f"{files} file{'s' if files > 1 else ''} of weights", bytes=files * wide * n,
               folder=run.output_path)
    every = run.save_steps if run.checkpoint_steps is None else run.checkpoint_steps
    if every == 0:
        return
    count = min(run.keep_checkpoints, math.ceil(steps / every) if every else saves)
    each = 4 + optimizer_bytes(config) + (4 if config.optimizer.use_ema else 0) + (wide if wide < 4 else 0)
    yield Disk(what=f"{count} checkpoint{'s' if count > 1 else ''}", bytes=round(count * each * n),
               folder=run.output_path)


def _cache_bytes(config: TrainConfig, pipe: Pipeline, cut: Cut, data: Data) -> int:
    """Slots are stored in float32, those of a text once for all images with it."""
    shapes_of = family(config.model.family).prepared_shapes
    if shapes_of is None or not pipe.store.has_config("vae") or not pipe.store.has_config(pipe.network):
        return 0
    of_text = {name for unit in cut.split(["prompt"])[0] for name in unit.output_params}
    tokens = round(float(np.mean(data.lengths))) if data.lengths and pipe.padded_slots else \
        getattr(pipe, "max_sequence_length", None)
    total = 0
    for size, count in data.sizes.items():
        latent = pipe.latent_shape(*size)
        shapes = {n: shape for n, shape in shapes_of(_configs(pipe), latent, tokens).items() if n in cut.cache}
        total += count * sum(4 * math.prod(shape) for name, shape in shapes.items() if name not in of_text)
    total += sum(count * 4 * _tokens_of(pipe, seen) for seen, count in data.references.items()) * (
        latent[0] * pipe.latent_patch**2 if data.references else 0)
    return total + data.texts * sum(4 * math.prod(shape) for name, shape in shapes.items() if name in of_text)


def free_disk(folder: str) -> int:
    """Bytes free where a folder is, or will be."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def short_form(plan: RunPlan) -> str:
    """A run in two lines: data and settings; and what it takes."""
    config, data, run = plan.config, plan.data, plan.config.run
    classes = f" and {data.classes} class images" if data.classes else ""
    held_out = f", {data.held_out} held out" if data.held_out else ""
    steps = "" if plan.steps is None else f"{plan.steps} steps, {plan.epochs:.3g} epochs; "
    learns = f"{count_text(plan.trained.count)} parameters learn; " if plan.trained.count and plan.steps else ""
    about = "at least " if plan.not_known or any(stage.unknown for stage in plan.stages) else "about "
    memory = f"memory {about}{plan.peak / GIB:.1f} of {plan.total / GIB:.1f} GiB"
    lines = [f"{config.model.family}: {data.rows} {plan.pipe.medium}s{classes}{held_out}, batch size {run.batch_size}, "
             f"task {config.objective.task}, output in {run.output_path}", f"{steps}{learns}{memory}"]
    if not plan.fits:
        lines.append("which will not fit: ms-diffsynth plan says what would (docs/how_to/plan.md)")
    return "\n".join(lines) + "\n"


def count_text(number: int) -> str:
    """``44.8 million``."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.{2 if word == 'billion' else 1}f} {word}"
    return f"{number:,}"


# -- what makes it fit -------------------------------------------------------------------------------------------------


def changed(config: TrainConfig, settings: Mapping[str, str]) -> TrainConfig:
    """The configuration with settings as they are typed behind flags. Raises: ConfigError."""
    sections = {name: getattr(config, name) for name in SECTIONS}
    for name, text in settings.items():
        value = SETTINGS[name].parse(Written(text=text, place=f"from the flag --{name}"))
        section = SETTINGS[name].section
        sections[section] = replace(sections[section], **{name: value})
    return validate(dataclasses.replace(config, **sections))


def remedies(plan: RunPlan) -> list[Remedy]:
    """What would make a run fit that does not: each alone, the least change first; else one that takes several."""
    if plan.fits:
        return []
    tried = [(settings, peak) for settings in _candidates(plan) if (peak := _peak(plan, settings)) is not None]
    alone = [Remedy(settings=settings, peak=peak) for settings, peak in tried if peak <= plan.limit]
    if alone:
        return alone
    together: dict[str, str] = {}
    least = plan.peak
    for settings, _ in tried:
        peak = _peak(plan, together | settings)
        if peak is not None and peak < least:
            together, least = together | settings, peak
        if least <= plan.limit:
            break
    if least > plan.limit:
        return []
    for name in list(together):  # what turned out not to be needed
        rest = {n: text for n, text in together.items() if n != name}
        peak = _peak(plan, rest)
        if peak is not None and peak <= plan.limit:
            together, least = rest, peak
    return [Remedy(settings=together, peak=least)]


def _candidates(plan: RunPlan) -> Iterator[dict[str, str]]:
    """Settings that may take less memory, the least change first."""
    config, run, model = plan.config, plan.config.run, plan.config.model
    network, is_adapter = plan.pipe.network, not model.trainable_models
    if plan.work.samples and run.sample_prompts:  # their encoders stay, and the VAE
        yield {"sample_prompts": "[]"}
    if not config.data.cache_dir and not stage_of(config.objective.task) and "moments" in plan.cut.cache:
        yield {"cache_dir": f"cache/{Path(run.output_path).name}"}
    if not model.use_gradient_checkpointing and plan.device == "Ascend":
        yield {"use_gradient_checkpointing": "true"}
    stored = sorted(in_8bit(config, plan.pipe))
    frozen = {name for stage in plan.stages for name in stage.models if (found := network_of(plan.pipe, name))
              and found.linear and (is_adapter or name not in _roots(model.trainable_models))} - {"vae"}
    if network in frozen and network not in stored:
        yield {"fp8_models": ",".join([*stored, network])}
    if frozen - {network, *stored}:
        yield {"fp8_models": ",".join([*stored, *sorted(frozen - set(stored))])}
    if not is_adapter and network in _roots(model.trainable_models):
        yield {"optimizer": "adafactor", "optimizer_args": ""}
        yield {"trainable_models": "null", "lora_base_model": network,
               "remove_prefix_in_ckpt": f"pipe.{network}."}
    size = run.batch_size
    while size > 1:
        size //= 2
        steps = config.optimizer.gradient_accumulation_steps * run.batch_size // size
        yield {"batch_size": str(size), "gradient_accumulation_steps": str(steps)}
    for side in SMALLER:
        if side * side < math.prod(plan.work.reference):
            yield {"edit_max_pixels": str(side * side)}
    for side in SMALLER:
        if side * side < math.prod(plan.work.size[-2:]):
            yield ({"height": str(side), "width": str(side)} if config.data.height else
                   {"max_pixels": str(side * side)})


def _roots(names: str | None) -> list[str]:
    return [name.strip().split(".")[0] for name in (names or "").split(",") if name.strip()]


def _peak(plan: RunPlan, settings: Mapping[str, str]) -> int | None:
    """The peak with these settings; None where they do not fit the others."""
    try:
        config = changed(plan.config, settings)
        cut, _ = cut_of(config, plan.pipe)
    except ConfigError:
        return None
    work = plan.work
    if {"height", "max_pixels"} & set(settings):
        most = config.data.max_pixels or config.data.height * config.data.width
        side = math.isqrt(most) // plan.pipe.division_factor * plan.pipe.division_factor
        work = replace(work, size=(*work.size[:-2], side, side))
    if "edit_max_pixels" in settings:
        work = replace(work, further=_most_tokens(plan.pipe, plan.data, config.data.edit_max_pixels))
    work = replace(work, samples=models_of_samples(config, plan.pipe),
                   images=work.images * config.run.batch_size // plan.config.run.batch_size)
    return max(stage.peak for stage in stages_of(config, plan.pipe, cut, work))
