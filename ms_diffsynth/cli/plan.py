"""``ms-diffsynth plan CONFIG.yaml``: what a run takes, before anything is downloaded, loaded or written.

It runs on any machine: a configuration for an Ascend is planned on a laptop.
"""
from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms_diffsynth.cli.look import Images, Report, counted, lines, noting, references, report, wrapped
from ms_diffsynth.config import TrainConfig, load_config
from ms_diffsynth.config.flags import add_flags, overrides_of, path_argument
from ms_diffsynth.errors import ConfigError, DataError, DeviceError, HubError, listing
from ms_diffsynth.hub.download import ModelConfig, parse_model_id_with_origin_paths, parse_path_or_model_id
from ms_diffsynth.storage.files import write_file

if TYPE_CHECKING:
    from ms_diffsynth.run.memory import Stage
    from ms_diffsynth.run.plan import RunPlan

BAR = 26  # characters
LABEL = 12
FEW = 0.005  # of a stage's peak: of what takes less only models are named
MADE_BY = "ms-diffsynth plan"  # what a picture of pairs says, so that no other file is ever replaced


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same as of ``train``, the device, and whether MindSpore's allocator is asked."""
    parser.usage = "ms-diffsynth plan [CONFIG.yaml] [--card GB] [--measure] [--offline] [--setting value ...]"
    parser.description += (" Nothing is downloaded or loaded, and nothing written but a picture of three pairs where a "
                           "run trains on reference images. The exit code is 69 when the run will not fit.")
    parser.add_argument("config", nargs="?", type=path_argument, metavar="CONFIG.yaml")
    parser.add_argument("--card", type=float, default=64.0, metavar="GB", help="memory of the Ascend (default: 64)")
    parser.add_argument("--measure", action="store_true", help="also build the training step on a stand-in for an "
                        "Ascend: its memory by MindSpore's own allocator, its kernels and waits; takes minutes")
    parser.add_argument("--pairs", type=path_argument, default=Path("pairs.png"), metavar="FILE", help="where three "
                        "rows with reference images are shown (default: pairs.png)")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub")
    add_flags(parser)


def execute(args: argparse.Namespace) -> int:
    """Say what the run takes."""
    config = load_config(args.config, overrides_of(args))
    if not args.card > 0:
        raise ConfigError(f"card={args.card:g}: expected GB of a device's memory, such as 64 or 32.")
    from ms_diffsynth import runtime
    from ms_diffsynth.run.build import build_datasets
    from ms_diffsynth.run.plan import plan_run

    with noting() as notes:
        runtime.configure(config.run.mode, "CPU")
        sets, problem = None, None
        try:
            sets = build_datasets(config)
        except DataError as error:  # what does not depend on the data is said all the same
            problem = error
        plan = plan_run(config, sets, args.card)
    found: Report = ([("data", f"{type(problem).__name__}: {problem}")] if problem else
                     [*_data(config, plan, sets), *_pairs(sets, args.pairs)])
    found += _downloads(config, args.offline)
    found += _work(plan)
    sys.stdout.write("\n".join(wrapped(line, others="") .rstrip() for line in _head(args, config, plan)) + "\n\n")
    sys.stdout.write(lines(found) + "\n")
    sys.stdout.write(_memory(plan) + "\n")
    sys.stdout.flush()
    if args.measure:
        sys.stdout.write(_measured(plan) + "\n")
    sys.stdout.writelines(wrapped(f"note: {note}") for note in [*_said(notes), *_notes(plan)])
    sys.stdout.write(_verdict(args, plan))
    if problem:
        sys.stdout.write("NOT READY: the data have the problems above. Correct them, then plan again.\n")
    return problem.exit_code if problem else 0 if plan.fits else DeviceError.exit_code


def _head(args: argparse.Namespace, config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    model = config.model
    pipe, hubs = plan.pipe, model.model_id_with_origin_paths
    names = [c.model_id.partition("/")[2] for c in parse_model_id_with_origin_paths(hubs) if c.model_id and
             pipe.given_as.get(f"{c.model_id}:{c.origin_file_pattern}") in (pipe.network, None)] if hubs else []
    names = list(dict.fromkeys(names)) or [os.path.basename(os.path.normpath(model.model_paths or "files of a hub"))]
    what = (f"{model.trainable_models}, all weights" if model.trainable_models else
            f"{'DoRA' if model.adapter == 'dora' else 'LoRA'} of rank {model.lora_rank}")
    where = "a CPU, this machine" if plan.device == "CPU" else f"one Ascend with {args.card:g} GB"
    dtype = "float32" if plan.device == "CPU" else config.run.dtype or "bfloat16"
    yield f"{what} of {listing(names, 3)}, on {where}, in {dtype}"


# -- data and downloads ------------------------------------------------------------------------------------------------


def _data(config: TrainConfig, plan: RunPlan, sets: Any) -> Iterator[tuple[str, str]]:
    data = plan.data
    if sets is not None and getattr(sets.instance, "rows", None):
        place = {"dataset_base_path": (config.data.dataset_base_path, "")}
        if config.data.dataset_folders:
            place["dataset_folders"] = list(config.data.dataset_folders), ""
        yield from report(Images(dataset=sets.instance, classes=sets.classes, job="lora",
                                 prompt=config.data.instance_prompt or "", place=place), None)
    else:
        yield f"{plan.pipe.medium}s", f"{data.rows} in a cache" + (f", and {data.classes} class images" if data.classes
                                                                   else "")
    if data.held_out:
        yield "held out", f"{data.held_out}, for the validation loss"
    for kind, texts in data.cuts.items():
        yield "tokens", f"{counted(len(texts), 'prompt')} longer than {kind}, and cut there, such as \"{texts[0]}...\""
    if data.texts and not data.cuts:
        looked = "" if data.looked_at >= data.texts else f", of the {data.looked_at} longest"
        yield "tokens", (f"no prompt is cut{looked}" if data.looked_at else
                         "whether prompts are cut is not known: the tokenizer is not on this machine")
    sizes = [f"{'x'.join(map(str, size))} ({n})" for size, n in sorted(data.sizes.items(), key=lambda pair: -pair[1])
             if size]
    yield "trained at", f"{listing(sizes, 8)}, {'frames x ' if plan.pipe.medium == 'video' else ''}height x width"
    times = {None: "for each shape of a batch, which only preparing tells", 1: "once"}
    yield "", ("the training step is compiled "
               + times.get(data.compilations, f"{data.compilations} times, once for each shape of a batch"))


def _pairs(sets: Any, path: Path) -> Iterator[tuple[str, str]]:
    """How many rows have references, and three of them as a picture: which is which, only a look can tell."""
    from PIL import Image, PngImagePlugin

    from ms_diffsynth.data.pairs import pairs_sheet

    dataset = sets.instance
    if "edit_image" not in getattr(dataset, "data_file_keys", ()) or not getattr(dataset, "rows", None):
        return
    yield from references(dataset)
    sheet = pairs_sheet(dataset)
    if sheet is None:
        return
    if os.path.lexists(path):
        with suppress(OSError, SyntaxError, ValueError), Image.open(path) as there:
            if there.info.get("Software") == MADE_BY:
                path.unlink()
    if os.path.lexists(path):
        yield "", f"{path} exists already, and is kept: --pairs FILE shows these images elsewhere"
        return
    text, content = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("Software", MADE_BY)
    sheet.save(content, "PNG", pnginfo=text)
    write_file(path, content.getvalue())
    yield "", f"look at {path}: a model that learns pairs the wrong way round does nothing"


def _downloads(config: TrainConfig, is_offline: bool) -> Iterator[tuple[str, str]]:
    """Files and bytes of each repository, and what of them is here."""
    base = os.environ.get("MS_DIFFSYNTH_MODEL_BASE_PATH") or None
    groups: dict[tuple[str, str | None], list[ModelConfig]] = {}
    for model in _repositories(config):
        groups.setdefault((model.model_id, model.revision), []).append(replace(model, local_model_path=base))
    reason, label = "--offline" if is_offline else "", "download"
    for (name, _), models in groups.items():
        files: dict[str, int] = {}
        try:
            for model in models:
                files |= replace(model, skip_download=is_offline).sizes() if not reason else {}
        except HubError as error:
            reason = str(error).partition(": ")[2].rstrip(".") or str(error)
        if reason:
            with noting():
                here = sum(_is_here(model) for model in models)
            state = "all" if here == len(models) else "none" if not here else f"{here} of {len(models)} models"
            yield label, f"{name}: not listed, {reason}; {state} of it is on this machine"
        else:
            with noting():
                left = {file: size for file, size in files.items() if not any(m.is_here(file) for m in models[:1])}
            yield label, f"{name}: {counted(len(files), 'file')}, {_gb(sum(files.values()))}" + (
                ", all here" if not left else f"; {_gb(sum(left.values()))} of it are not here yet")
        label = ""
    if not groups:
        yield label, "nothing"


def _repositories(config: TrainConfig) -> Iterator[ModelConfig]:
    """What the run asks of hubs."""
    from ms_diffsynth.run.pipeline import source_of

    model, hub = config.model, source_of(config)
    texts = [t for name in vars(model) if name.startswith("tokenizer") and (t := getattr(model, name))]
    texts += [model.template_model_id_or_path] if model.template_model_id_or_path else []
    found = [parse_path_or_model_id(text, hub=hub) for text in texts]
    if model.model_id_with_origin_paths:
        found += parse_model_id_with_origin_paths(model.model_id_with_origin_paths, hub)
    yield from (one for one in found if one.model_id)


def _is_here(model: ModelConfig) -> bool:
    try:
        return bool(replace(model, skip_download=True).resolve())
    except HubError:
        return False


# -- what it takes -----------------------------------------------------------------------------------------------------


def _work(plan: RunPlan) -> Iterator[tuple[str, str]]:
    from ms_diffsynth.run.plan import count_text, free_disk

    if plan.steps is not None:
        beside = f", beside {count_text(plan.network)} of the network" if plan.network else ""
        lost = f"; not counted: {listing(plan.trained.unknown)}" if plan.trained.unknown else ""
        yield "learns", f"{count_text(plan.trained.count)} parameters{beside if plan.trained.is_adapter else ''}{lost}"
        run = plan.config.run
        micro = plan.config.optimizer.gradient_accumulation_steps
        images = f"{micro} x {run.batch_size}" if micro > 1 else str(run.batch_size)
        epochs = f", {plan.epochs:.4g} epochs"
        yield "steps", f"{plan.steps} of {images} {plan.pipe.medium}{'' if images == '1' else 's'}" + (
            epochs if plan.data and plan.data.batches else "")
    label = "disk"
    for folder in dict.fromkeys(item.folder for item in plan.disk):
        items = ", ".join(f"{item.what} {_gb(item.bytes)}" for item in plan.disk if item.folder == folder)
        yield label, f"{folder}: {items}; {_gb(free_disk(folder))} free"
        label = ""


def _memory(plan: RunPlan) -> str:
    """A bar for each stage, and what is in it."""
    from ms_diffsynth.run.memory import GIB, RESERVED

    left = plan.total - plan.limit
    text = wrapped(f"{plan.limit / GIB:.1f} GiB can be used, of the {plan.total / GIB:.1f} of the " + (
        "machine" if plan.device == "CPU" else "device" if left > RESERVED else
        f"device: {left / GIB:.0f} are left to CANN and workspaces, an estimate"), f"{'memory':{LABEL}}", " " * LABEL)
    for stage in plan.stages:
        fits = "fits" if stage.peak <= plan.limit else "DOES NOT FIT"
        least = "at least " if stage.unknown or plan.not_known else ""
        text += f"  {stage.name:{LABEL - 2}}{_bar(stage.peak / plan.limit)} {least}{stage.peak / GIB:.1f} GiB, {fits}\n"
        text += wrapped(_parts(stage), " " * LABEL, " " * LABEL)
    return text + wrapped("worked out from shapes" + (
        "" if plan.device == "CPU" else "; --measure asks MindSpore's own allocator"), " " * LABEL, " " * LABEL)


def _parts(stage: Stage) -> str:
    from ms_diffsynth.runtime import memory_text

    both = [*sorted(stage.models.items(), key=lambda item: -item[1]),
            *sorted(stage.parts.items(), key=lambda item: -item[1])]
    named = [f"{name} {memory_text(size)}" for name, size in both if name in stage.models or size > FEW * stage.peak]
    return ", ".join(named) + (f"; not counted: {listing(dict.fromkeys(stage.unknown))}" if stage.unknown else "")


def _bar(share: float) -> str:
    full, empty = "█░" if (sys.stdout.encoding or "").lower().startswith("utf") else "#."
    filled = min(round(share * BAR), BAR)
    return full * filled + empty * (BAR - filled)


def _gb(size: int) -> str:
    """Bytes as disks and hubs count them."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB" if size >= 5e4 else f"{size / 1e3:.0f} kB"


def _measured(plan: RunPlan) -> str:
    """The training step on the stand-in, in the form of `_memory`."""
    from ms_diffsynth.debug.skeleton import measure_by_depth
    from ms_diffsynth.runtime import memory_text

    found = measure_by_depth(_step(plan))
    train = next(stage for stage in plan.stages if stage.name == "train")
    beside = sum(size for name, size in train.models.items() if name != plan.pipe.network)
    also = f", with the models beside the network {memory_text(found.peak + beside)}" if beside else ""
    text = (f"the training step holds {memory_text(found.held)}, at its peak {memory_text(found.peak)}{also}, by "
            f"MindSpore's own allocator on a stand-in for an Ascend; it is {found.kernels:,} kernels, of these "
            f"{found.casts} casts and {found.transposes} transpositions, and the host waits "
            f"{counted(found.synchronisations, 'time')}")
    return wrapped(text, f"{'measured':{LABEL}}", " " * LABEL)


def _step(plan: RunPlan) -> Any:
    """The training step as `debug.skeleton` builds it. Raises: ConfigError for one that it does not know."""
    from ms_diffsynth.debug.skeleton import Plan
    from ms_diffsynth.registry import family

    config, model, pipe, work = plan.config, plan.config.model, plan.pipe, plan.work
    chosen = family(model.family)
    titles = [chosen.repositories.get(c.model_id) for c in _repositories(config)
              if pipe.given_as.get(f"{c.model_id}:{c.origin_file_pattern}") == pipe.network]
    is_whole = model.trainable_models == pipe.network
    others = [f"{name}={value}" for name, value, usual in (
        ("device", plan.device, "Ascend"), ("mode", config.run.mode, "graph"), ("adapter", model.adapter, "lora"),
        ("trainable_models", model.trainable_models, pipe.network if is_whole else None),
        ("lora_base_model", model.lora_base_model, model.lora_base_model if is_whole else pipe.network),
        ("lora_target_modules", model.lora_target_modules, ""),
        ("optimizer", config.optimizer.optimizer, "adamw")) if value != usual]
    if others or None in titles or len(titles) != 1:
        raise ConfigError(f"--measure: {listing(others) or 'this model'} is not measured: expected a LoRA on the usual "
                          f"layers, or the whole network, of {listing(chosen.repositories, 20) or 'a published model'},"
                          " for an Ascend. Leave out --measure.")
    from ms_diffsynth.run.memory import in_8bit

    return Plan(family=model.family, model=titles[0], height=work.size[0], width=work.size[1], batch_size=work.images,
                text_tokens=work.prompt, lora_rank=model.lora_rank, recompute=model.use_gradient_checkpointing,
                is_8bit=pipe.network in in_8bit(config, pipe), is_whole=is_whole, dtype=config.run.dtype or "bfloat16",
                task=config.objective.task.partition(":")[0], edit_tokens=work.further)


# -- what to do --------------------------------------------------------------------------------------------------------


def _said(notes: list[str]) -> list[str]:
    """What was warned of while the data were read: what the report says otherwise is left out."""
    return [note for note in dict.fromkeys(notes) if "is cut to" not in note and "skip_download" not in note]


def _notes(plan: RunPlan) -> Iterator[str]:
    from ms_diffsynth.run.plan import free_disk

    config = plan.config
    for name in plan.not_known:
        yield (f"{name}: which model that is, and its size, is known only after the download, so its memory is not "
               "counted.")
    if config.model.template_model_id_or_path and "template_model" not in plan.pipe.models:
        yield "the template is not counted: its code is run only with --trust_template_code."
    for folder in dict.fromkeys(item.folder for item in plan.disk):
        needed, free = sum(item.bytes for item in plan.disk if item.folder == folder), free_disk(folder)
        if needed > free:
            yield f"{folder} needs {_gb(needed)} of disk, and {_gb(free)} are free."


def _verdict(args: argparse.Namespace, plan: RunPlan) -> str:
    from ms_diffsynth.run.memory import GIB
    from ms_diffsynth.run.plan import remedies

    if plan.fits:
        least = " as far as it is known" if plan.not_known or any(stage.unknown for stage in plan.stages) else ""
        return f"fits{least}: {plan.peak / GIB:.1f} of {plan.limit / GIB:.1f} GiB\n"
    found = remedies(plan)
    text = f"DOES NOT FIT: {plan.peak / GIB:.1f} of {plan.limit / GIB:.1f} GiB. "
    if not found:
        return text + "No setting that is known here makes it fit: choose a smaller model or a larger device.\n"
    several = len(found) == 1 and len(found[0].settings) > 1
    text += "Together these make it fit:\n" if several else "Each of these makes it fit:\n"
    flags = [" ".join(f"--{name} {shlex.quote(value)}" for name, value in remedy.settings.items()) for remedy in found]
    wide = min(max(map(len, flags)), 60)
    return text + "".join(f"  {flag:{wide}}  {remedy.peak / GIB:.1f} GiB\n" for flag, remedy in zip(flags, found))
