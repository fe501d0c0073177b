"""``ms-diffsynth init DIR``: look at images, say what they are, and write a configuration that trains on them as it is.

MindSpore is not imported: the answer is there in seconds.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ms_diffsynth.cli.look import (
    Images,
    Report,
    Settings,
    bundled_folder,
    count_tokens,
    counted,
    lines,
    look_at_all,
    noting,
    read_images,
    report,
    three,
    wrapped,
)
from ms_diffsynth.config.bases import BASES, DEVICES, Base, Fit
from ms_diffsynth.config.flags import add_flags, overrides_of, path_argument
from ms_diffsynth.config.loading import commented_yaml, load_config
from ms_diffsynth.config.settings import TrainConfig
from ms_diffsynth.data.buckets import Bucket, choose_buckets, describe_fit, nearest_bucket
from ms_diffsynth.data.pairs import as_list
from ms_diffsynth.data.paths import plain
from ms_diffsynth.errors import ConfigError, OutputError, listing, nearest
from ms_diffsynth.storage.files import write_file

# what DIR, --base, --trigger and --device-memory decide
DECIDED = ("family", "model_paths", "model_id_with_origin_paths", "dataset_base_path", "dataset_folders",
           "trigger_word", "device_memory")
JOBS = {"lora": "LoRA", "dreambooth": "DreamBooth LoRA", "edit": "LoRA for editing", "template": "template"}
SHAPE_MEMORY = ("height", "width", "max_pixels", "batch_size", "lora_rank", "lora_target_modules", "adapter",
                "trainable_models", "use_gradient_checkpointing", "fp8_models", "dtype", "optimizer")
COMMENTS = {"caption_dropout": "a tenth of the samples have no prompt: for guidance",
            "lora_target_modules": "the usual layers, and two more of the single blocks",
            "task": "the noise levels of diffusers' scripts"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, the model to train on, the device, and a flag for every other setting."""
    parser.usage = "ms-diffsynth init DIR [DIR ...] [--base BASE] [--trigger WORD] [--setting value ...]"
    parser.description += " Every setting of 'train' is a flag too, and is written into the file."
    parser.add_argument("folders", nargs="+", type=path_argument, metavar="DIR",
                        help="folder of images; DIR=10 shows its images ten times in an epoch")
    parser.add_argument("--base", default="emoji-flux", help=f"model to train on: {', '.join(BASES)} (default: "
                        "emoji-flux, small enough for a CPU)")
    parser.add_argument("--device-memory", "--device_memory", dest="memory", type=int, metavar="GB",
                        help="of the Ascend 910B: 64 or 32 (default: 64)")
    parser.add_argument("--trigger", metavar="WORD", help="word that stands for what is learned, such as sks: in the "
                        "prompt of images without a caption, and put in front of captions without it")
    parser.add_argument("--output", type=path_argument, metavar="FILE", help="where to write (default: DIR.yaml here)")
    add_flags(parser, without=DECIDED)


def execute(args: argparse.Namespace) -> int:
    """Look, write the configuration, and say what was found."""
    base, given = _base(args), overrides_of(args)
    if args.trigger is not None and not args.trigger.strip():
        raise ConfigError("trigger is empty: expected a word that stands for what is learned, such as sks.")
    output = args.output or Path(f"{_slug(args, base)}.yaml")
    if os.path.lexists(output):
        raise OutputError(f"{output} exists already, and is kept. Choose another name by --output, or remove it.")
    with noting() as notes:
        images = read_images(args.folders, base, args.trigger, given)
    fit = _fit(base, images.job, args.memory)
    looks = look_at_all(images.dataset)
    settings = _settings(base, fit, images, output.stem, given)
    config = load_config(None, {name: _as_flag(value) for name, (value, _) in settings.items()})
    usual, line, warnings = _sizes(images, base, config)
    settings["dataset_base_path"] = config.data.dataset_base_path, f"{counted(len(images.files), 'image')}, {usual}"
    tokens, memory = count_tokens(images.prompts, base), _memory(base, images.job, fit, given) if fit else ""
    found = [*report(images, looks, base, tokens), ("trained at", line), *_plan(args, base, memory, images, config)]
    notes = [*dict.fromkeys(notes), *warnings, *_notes(images, base, config, tokens)]  # folders are read twice
    text = commented_yaml(_head(args, base, memory, images, output), settings)
    write_file(output, text.encode())
    said = [lines(found), "".join(wrapped(f"note: {note}") for note in notes),
            f"wrote {output}, {len(text.splitlines())} lines. Next:\n",
            "".join(f"  {command}\n" for command in _next(base, images, config, output))]
    sys.stdout.write("\n".join(filter(None, said)))
    return 0


# -- what to train on ------------------------------------------------------------------------------------------------


def _base(args: argparse.Namespace) -> Base:
    if args.base not in BASES:
        raise ConfigError(f"base={args.base}: expected one of {', '.join(BASES)}.{nearest(args.base, BASES)}")
    base = BASES[args.base]
    if args.memory is not None and not base.fits:
        raise ConfigError(f"device-memory={args.memory}: {base.title} fits every device. Remove it.")
    if args.memory is not None and args.memory not in DEVICES:
        raise ConfigError(f"device-memory={args.memory}: expected {' or '.join(map(str, DEVICES))}, GB of an Ascend "
                          "910B.")
    if base.model_paths and not bundled_folder(base).is_dir():
        raise ConfigError(f"base={args.base}: this installation lacks the model, {base.model_paths}. Install the "
                          "package again, or choose another base.")
    return base


def _fit(base: Base, job: str, memory: int | None) -> Fit | None:
    """How the job fits the device. Raises: ConfigError when it does not, or the base has no such job."""
    if not base.fits:
        if job in ("edit", "template"):
            raise ConfigError(f"base={base.title} has no {JOBS[job]}. Choose flux2-klein by --base.")
        return None
    if job == "lora" and "edit" in base.fits and job not in base.fits:
        raise ConfigError(f"base={base.title} learns to edit, and there are no reference images: expected metadata "
                          "with a column edit_image, or --edit_folders (docs/how_to/editing.md). Write them, or choose "
                          "another base.")
    if job not in base.fits:
        able = [name for name, other in BASES.items() if job in other.fits]
        raise ConfigError(f"base={base.title} has no preset for a {JOBS[job]}: expected one of {listing(able)}.")
    found = base.fits[job].get(memory or 64)
    if found is None:
        needed = f"{base.fits[job][64].peak:.1f} GiB"
        raise ConfigError(f"device-memory={memory}: a {JOBS[job]} of {base.title} takes {needed}, expected a device of "
                          "64 GB. Choose another base.")
    return found


def _sizes(images: Images, base: Base, config: TrainConfig) -> tuple[str, str, list[str]]:
    """At which sizes images are trained, by the rules of training (`run.build`): the usual one, all of them and what
    that costs, and what to warn of.
    """
    data, sizes = config.data, [images.dataset.image_size(row) for row in range(len(images.files))]
    if data.height:
        buckets, remedy = [Bucket(data.height, data.width)], "Leave out --height and --width"
    else:
        both = [*sizes, *(images.classes.image_size(row) for row in range(len(images.classes.rows)))
                ] if images.classes else sizes
        buckets = choose_buckets(both, data.max_pixels or base.side**2, base.division_factor,
                                 1 if images.classes and data.buckets is None else data.buckets)
        remedy = f"Give --buckets {2 * len(buckets)} for more sizes, or crop them"
    line, warnings = describe_fit(sizes, images.files, buckets, remedy)
    size, count = Counter(nearest_bucket(*size, buckets) for size in sizes).most_common(1)[0]
    usual = f"all at {size}" if count == len(sizes) else f"{count} at {size}, others near their own shapes"
    return usual, line.partition(": ")[2], [f"{warning}." for warning in warnings]


# -- what is written -------------------------------------------------------------------------------------------------


def _settings(base: Base, fit: Fit | None, images: Images, name: str, given: dict[str, str]) -> Settings:
    """The settings of the file, in its order, each with a comment. What was given on the command line wins."""
    found: Settings = {"family": (base.family, "")}
    if base.model_paths:
        found["model_paths"] = base.model_paths, "which the package brings"
    else:
        found["model_id_with_origin_paths"] = base.file_names, ""
    if images.job == "template":
        found["template_model_id_or_path"] = given["template_model_id_or_path"], ""
        found["trainable_models"] = "template_model", ""
        found["remove_prefix_in_ckpt"] = "pipe.template_model.", ""
    found |= fit.settings if fit else {}
    found |= images.place
    if base.is_cached:
        found["cache_dir"] = f"cache/{name}", f"encoded once; then the encoders, {base.encoders} GiB, are unloaded"
    if images.job == "dreambooth":
        found |= {"task": ("dreambooth", ""), "weighting_scheme": ("logit_normal", ""),
                  "with_prior_preservation": (True, "a class image beside each image")}
    found |= {setting: (value, COMMENTS.get(setting, "")) for setting, value in base.settings.items()}
    if not base.model_paths:
        found["device"] = "Ascend", ""
    if base.batch_size > 1:
        found["batch_size"] = base.batch_size, ""
    if "num_epochs" not in given or "max_train_steps" in given:
        batch = _number(given, "batch_size") or base.batch_size
        steps = _number(given, "max_train_steps") or _steps(base, len(images.dataset), batch)
        shown = steps * batch / len(images.dataset)
        found["max_train_steps"] = steps, f"each image about {shown:.0f} times" if shown >= 1.5 else ""
        found["save_steps"] = max(steps // 4, 1), ""
    found |= {"output_path": (_free(f"runs/{name}"), ""), "resume": ("auto", "after a stop the same command resumes")}
    if base.model_paths:
        found["sample_prompts"] = _sample_prompts(images), "before and after"
    for setting, text in given.items():
        value, comment = found.get(setting, ("", ""))
        found[setting] = text, comment if str(value) == text else ""
    return found


def _number(given: dict[str, str], setting: str) -> int:
    """A whole number of the command line; 0 where there is none."""
    text = given.get(setting, "")[:9]
    return int(text) if text.isdecimal() else 0


def _steps(base: Base, items: int, batch: int) -> int:
    """So many that every image is shown a hundred times, between the base's least and most; a multiple of 100."""
    least, most = base.steps
    return min(max(-(-items // batch) * 100, least), most)


def _free(folder: str) -> str:
    """The folder, or the first of folder-2, folder-3, ... that is not there: another run's is never continued."""
    names = itertools.chain([folder], (f"{folder}-{k}" for k in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def _sample_prompts(images: Images) -> list[str]:
    """Three of the prompts, or fewer; that of images without a caption is the first."""
    own = images.with_trigger(images.prompt)
    prompts = sorted(images.prompts, key=lambda prompt: prompt != own)
    return three(prompts)


def _head(args: argparse.Namespace, base: Base, memory: str, images: Images, output: Path) -> list[str]:
    """The comment at the beginning of the file."""
    words = [*map(str, args.folders), *(["--base", args.base] if args.base != "emoji-flux" else []),
             *(["--device-memory", str(args.memory)] if args.memory else []),
             *(["--trigger", args.trigger] if args.trigger else []),
             *(word for name, text in overrides_of(args).items() for word in (f"--{name}", text)),
             *(["--output", str(args.output)] if args.output else [])]
    where = f"one Ascend 910B with {args.memory or 64} GB, in bfloat16" if memory else "a CPU or an Ascend"
    what = JOBS[images.job][0].upper() + JOBS[images.job][1:]
    head = [f"{what} of {base.title} on {counted(len(images.files), 'image')}, for {where}:",
            f"  ms-diffsynth train {shlex.quote(str(output))}{_trust(images)}"]
    gate = f"; {base.title} is gated: accept its licence on its page first, then hf auth login" if base.is_gated else ""
    more = [f"Written by: ms-diffsynth init {shlex.join(words)}"]
    more += [f"Memory: {memory}."] if memory else []
    more += [f"The first run downloads {base.download}{gate}."] if base.download else []
    return [*head, *(line for text in more for line in textwrap.wrap(text, 118, break_on_hyphens=False,
                                                                     break_long_words=False))]


def _memory(base: Base, job: str, fit: Fit, given: dict[str, str]) -> str:
    """What the preset takes, and which of the given settings change that."""
    beside = "" if base.is_cached else f", and {base.encoders} for the text encoder"
    changed = [f"--{name}" for name in SHAPE_MEMORY if given.get(name, str(base.side)) != str(base.side)]
    but = f"; more or less with {', '.join(changed)}" if changed else ""
    also = " with a reference as large" if job == "edit" else ""
    return (f"{fit.peak:.1f} GiB in a step at {base.side} x {base.side} pixels{also}{beside}, measured on a stand-in "
            f"for the NPU (docs/reference/memory.md){but}")


def _trust(images: Images) -> str:
    return " --trust_template_code" if images.job == "template" else ""


def _slug(args: argparse.Namespace, base: Base) -> str:
    """A name for files, of the folders and the base."""
    names = [re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(path)).name.partition("=")[0]).strip("-.") for path in
             args.folders]
    return "-".join([*(name for name in names if name), *([args.base] if base.files else [])])[:100] or "images"


# -- what is said ----------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace, base: Base, memory: str, images: Images, config: TrainConfig) -> Report:
    """What the file will train."""
    steps, epochs = config.run.max_train_steps, config.run.num_epochs
    trained = JOBS[images.job] + ("" if images.job == "template" else f" of rank {config.model.lora_rank}")
    others = f"; others by --base {', '.join(name for name in BASES if name != args.base)}" if base.model_paths else ""
    found: Report = [("base", f"{base.title}, for {base.side} x {base.side} pixels{others}"),
                     ("training", f"{trained}, {counted(epochs, 'epoch') if steps is None else counted(steps, 'step')} "
                      f"of {counted(config.run.batch_size, 'image')}{' a step' if steps is None else ''}")]
    if memory:
        found.append(("memory", f"{memory}; a device of {args.memory or 64} GB has {DEVICES[args.memory or 64]} GiB"))
    return found


def _notes(images: Images, base: Base, config: TrainConfig, tokens: dict[str, int] | None) -> Iterator[str]:
    """What the user may want to change."""
    dataset = images.dataset
    areas = [width * height for width, height in map(dataset.image_size, range(len(dataset.rows)))]
    small = sum(4 * area < base.side**2 for area in areas)
    if small and config.data.height is None and config.data.max_pixels is None:
        yield (f"{small} of {len(areas)} images have less than a quarter of the {base.side} x {base.side} pixels that "
               f"{base.title} is made for, and are trained at their own size. --height {base.side} --width {base.side} "
               "enlarges them; larger images are better.")
    if cut := [prompt for prompt, number in (tokens or {}).items() if number > base.tokens]:
        yield (f"{len(cut)} of {len(tokens)} prompts are longer than the {base.tokens} tokens that {base.title} reads, "
               f"and lose their end, such as \"{plain(cut[0], 90)}\". Put what matters first.")


def _next(base: Base, images: Images, config: TrainConfig, output: Path) -> Iterator[str]:
    """The commands that come next."""
    if base.is_gated:
        yield f"hf auth login   # once: {base.title} is gated, accept its licence on its page of the hub first"
    yield f"ms-diffsynth train {shlex.quote(str(output))}{_trust(images)}"
    if images.job == "template":
        yield "# then pack and use it: docs/how_to/templates.md"
        return
    prompt, run = _sample_prompts(images)[0] or images.prompt, config.run
    if not base.model_paths:
        row = next((row for row in images.dataset.rows if images.job == "edit" and row.get("edit_image")), {})
        given = [os.path.join(config.data.dataset_base_path, name) for name in as_list(row.get("edit_image") or [])]
        edited = "".join(f" --edit_image {shlex.quote(name)}" for name in given)
        prompt = images.with_trigger(row["prompt"]) if row else prompt
        yield f"ms-diffsynth sample --run {shlex.quote(run.output_path)} --prompt {shlex.quote(prompt)}{edited}"
        return
    name = f"epoch-{run.num_epochs - 1}" if run.max_train_steps is None else f"step-{run.max_train_steps}"
    yield (f"ms-diffsynth sample {base.model_paths} --lora {shlex.quote(f'{run.output_path}/{name}.safetensors')} "
           f"--prompt {shlex.quote(prompt)}")


def _as_flag(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
