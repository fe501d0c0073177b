"""``ms-diffsynth init DIR``: look at images, say what they are, and write a configuration that trains on them as it is.

MindSpore is not imported: the answer is there in seconds.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ms_diffsynth.config.bases import BASES, DEVICES, DIVISION_FACTOR, Base, Fit
from ms_diffsynth.config.flags import add_flags, overrides_of, path_argument
from ms_diffsynth.config.loading import commented_yaml, load_config
from ms_diffsynth.config.settings import TrainConfig
from ms_diffsynth.data.buckets import Bucket, choose_buckets, describe_fit, nearest_bucket
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.folders import folder_problems, parse_folders
from ms_diffsynth.data.images import Look, look_at
from ms_diffsynth.data.paths import plain, resolve
from ms_diffsynth.data.prompts import has_word
from ms_diffsynth.errors import ConfigError, DataError, OutputError, listing, nearest
from ms_diffsynth.hub.bundled import bundled
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.storage.files import write_file

# what DIR, --base, --trigger and --device-memory decide
DECIDED = ("family", "model_paths", "model_id_with_origin_paths", "dataset_base_path", "dataset_folders",
           "trigger_word", "device_memory")
JOBS = {"lora": "LoRA", "dreambooth": "DreamBooth LoRA", "edit": "LoRA for editing", "template": "template"}
TOKENIZERS = Path(__file__).parents[1] / "pipelines/shared/tokenizers"
MOST_DECODED = 2_000_000_000  # pixels, which takes about 20 s on two cores; of more images only the files are compared
REPEATS_IN_NAME = re.compile(r"(\d{1,2}|100)_(.+)")  # of a folder, as kohya's scripts read it: 10_sks cat

Settings = dict[str, tuple[Any, str]]  # name -> value and comment
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
    output = args.output or Path(f"{_slug(args, base)}.yaml")
    if os.path.lexists(output):
        raise OutputError(f"{output} exists already, and is kept. Choose another name by --output, or remove it.")
    with _noting() as notes:
        images = _read(args, base, given)
    fit = _fit(base, images.job, args.memory)
    looks = _look(images.dataset)
    buckets, line, warnings = _buckets(images, base, given)
    settings = _settings(base, fit, images, output.stem, given, buckets)
    config = load_config(None, {name: _as_flag(value) for name, (value, _) in settings.items()})
    tokens = _tokens(images.prompts, base)
    report = [*_report(images, looks, base, config, tokens, line), *_plan(args, base, fit, images, config)]
    notes += [*warnings, *_notes(images, base, config, tokens)]
    text = commented_yaml(_head(args, base, fit, images, output), settings)
    write_file(output, text.encode())
    said = [_lines(report), "".join(_wrapped(f"note: {note}") for note in notes),
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
    if base.model_paths and not _bundled(base).is_dir():
        raise ConfigError(f"base={args.base}: this installation lacks the model, {base.model_paths}. Install the "
                          "package again, or choose another base.")
    return base


def _bundled(base: Base) -> Path:
    return bundled(base.model_paths) or Path(base.model_paths)


def _fit(base: Base, job: str, memory: int | None) -> Fit | None:
    """How the job fits the device. Raises: ConfigError when it does not, or the base has no such job."""
    if not base.fits:
        if job in ("edit", "template"):
            raise ConfigError(f"base={base.title} has no {JOBS[job]}. Choose flux2-klein by --base.")
        return None
    if job not in base.fits:
        able = [name for name, other in BASES.items() if job in other.fits]
        raise ConfigError(f"base={base.title} has no preset for a {JOBS[job]}: expected one of {listing(able)}.")
    found = base.fits[job].get(memory or 64)
    if found is None:
        raise ConfigError(f"a {JOBS[job]} of {base.title} takes {base.fits[job][64].peak} GiB: expected a device of "
                          f"64 GB, not of {memory}. Choose another base.")
    return found


# -- what is there ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Images:
    """The images, and the settings that say where they are.

    Attributes:
        names: of the folders, as they were given.
        prompt: of images without a caption.
        place: settings of the data.
    """

    dataset: UnifiedDataset
    classes: UnifiedDataset | None
    job: str
    names: list[str]
    prompt: str
    place: Settings

    @property
    def prompts(self) -> dict[str, str]:
        """Each prompt that is trained, and the first image that has it."""
        first: dict[str, str] = {}
        for k, row in enumerate(self.dataset.rows):
            first.setdefault(self.with_trigger(row["prompt"]), self.dataset.label(k))
        return first

    def with_trigger(self, prompt: str) -> str:
        """A prompt as it is trained."""
        word = self.place.get("trigger_word", ("", ""))[0]
        return f"{word}, {prompt}" if word and not has_word(prompt, word) else prompt


def _read(args: argparse.Namespace, base: Base, given: dict[str, str]) -> Images:
    """Raises: DataError for images, captions or metadata that cannot be trained on."""
    root, folders = _folders(args.folders)
    how: dict[str, Any] = {"image_column": given.get("image_column"), "caption_column": given.get("caption_column"),
                           "data_file_keys": given.get("data_file_keys", "image"), "required": ["image", "prompt"],
                           "allow_outside_base": given.get("allow_outside_base", "false").lower() == "true"}
    metadata = given.get("dataset_metadata_path")
    if folders and metadata:
        raise ConfigError(f"dataset_metadata_path={metadata} with several folders, each of which has captions or "
                          "metadata of its own: expected one folder. Give the folder that it is about.")

    def read(instance: str) -> UnifiedDataset:
        if folders:
            return UnifiedDataset.of_folders(root, folders, instance_prompt=instance, **how)
        return UnifiedDataset(root, metadata, instance_prompt=instance, **how)

    trigger = args.trigger or "sks"
    prompt = given.get("instance_prompt", base.prompt.format(trigger=trigger))
    dataset = read(prompt)
    if not folders and not metadata and (named := _repeats_in_names(dataset)):
        folders, dataset = named, read(prompt)
    named = {match[2] for name in folders if (match := REPEATS_IN_NAME.fullmatch(os.path.basename(name)))}
    if dataset.uncaptioned and args.trigger is None and "instance_prompt" not in given and len(named) == 1:
        prompt, = named
        dataset = read(prompt)
    job = ("template" if "template_model_id_or_path" in given else "dreambooth" if "class_base_path" in given else
           "edit" if "edit_image" in dataset.table.columns and "edit" in base.fits else "lora")
    place: Settings = {"dataset_base_path": (root, "")}
    if folders:
        place["dataset_folders"] = [f"{name}={repeat}" for name, repeat in folders.items()], "shown so often an epoch"
    if metadata:
        place["dataset_metadata_path"] = metadata, ""
    if job in ("edit", "template"):
        extra = "edit_image" if job == "edit" else "template_inputs"
        if extra not in dataset.table.columns:
            raise DataError(f"{dataset.table.source} has no column {extra}, which a template is told: it has "
                            f"{listing(dataset.table.columns)}. Write metadata.jsonl with it "
                            "(docs/how_to/templates.md).")
        if job == "edit":
            how["data_file_keys"] = "image,edit_image"
            dataset = read(prompt)
            place["data_file_keys"] = how["data_file_keys"], ""
        place["extra_inputs"] = extra, ""
    elif "edit_image" in dataset.table.columns:
        logging.getLogger("ms_diffsynth.data").warning(
            "the column edit_image is not used: of the bases only flux2-klein is trained to edit.")
    if dataset.uncaptioned:
        place["instance_prompt"] = prompt, f"of {_count(len(dataset.uncaptioned), 'image')} without a caption"
    lacking = [k for k, row in enumerate(dataset.rows) if args.trigger and not has_word(row["prompt"], args.trigger)]
    if lacking:
        place["trigger_word"] = args.trigger, f"put in front of {_count(len(lacking), 'prompt')}"
    if dataset.uncaptioned and len(named) > 1:
        logging.getLogger("ms_diffsynth.data").warning(
            "the folders' names say different things (%s), and one instance_prompt serves all of them: write captions.",
            listing(named, 5))
    classes = _classes(given, place, prompt, trigger) if job == "dreambooth" else None
    return Images(dataset=dataset, classes=classes, job=job, names=[str(f) for f in args.folders], prompt=prompt,
                  place=place)


def _classes(given: dict[str, str], place: Settings, prompt: str, trigger: str) -> UnifiedDataset:
    """The class images; those without a caption get the prompt without the first word of the trigger."""
    word = trigger.split()[0]
    usual = re.sub(rf"(?<!\w){re.escape(word)}(?!\w) ?", "", prompt) if len(trigger.split()) > 1 else None
    class_prompt = given.get("class_prompt", usual)
    place["class_base_path"] = given["class_base_path"], "so that the class is not forgotten"
    classes = UnifiedDataset(given["class_base_path"], given.get("class_metadata_path"), data_file_keys="image",
                             required=["image", "prompt"], instance_prompt=class_prompt, prompt_setting="class_prompt")
    if classes.uncaptioned:
        place["class_prompt"] = class_prompt, f"of {_count(len(classes.uncaptioned), 'class image')} without a caption"
    return classes


def _folders(given: Sequence[Path]) -> tuple[str, dict[str, int]]:
    """The data folder, and the folders in it with how often an epoch shows their images; no such for a single one."""
    pairs = []
    for path in given:
        name, repeat = (str(path), None) if path.is_dir() else next(iter(parse_folders([str(path)]).items()))
        if not os.path.isdir(name):
            raise DataError(f"{name} is not a folder: expected a folder of images. Correct the path.")
        named = REPEATS_IN_NAME.fullmatch(os.path.basename(os.path.abspath(name)))
        pairs.append((name, repeat if repeat is not None else int(named[1]) if named else 1))
    if len(pairs) == 1 and pairs[0][1] == 1:
        return pairs[0][0], {}
    if len(pairs) == 1:
        root = os.path.dirname(os.path.normpath(pairs[0][0])) or "."
    else:
        paths = [os.path.normpath(name) for name, _ in pairs]
        if len({os.path.isabs(path) for path in paths}) > 1 or any(path.startswith(os.pardir) for path in paths):
            paths = [os.path.abspath(path) for path in paths]
        root = os.path.commonpath(paths) or "."
    texts = [f"{os.path.relpath(name, root)}={repeat}" for name, repeat in pairs]
    if problem := next(folder_problems(texts), None):
        raise ConfigError(problem.replace("dataset_folders", "DIR"))
    return root, parse_folders(texts)


def _repeats_in_names(dataset: UnifiedDataset) -> dict[str, int]:
    """Folders named as kohya's scripts want them, when every image is in one: ``10_sks cat`` -> 10."""
    tops = dict.fromkeys(Path(row["image"]).parts[0] if os.path.dirname(row["image"]) else "" for row in dataset.rows)
    matches = {top: REPEATS_IN_NAME.fullmatch(top) for top in tops}
    is_folder = dataset.table.source == dataset.base_path
    return {top: int(m[1]) for top, m in matches.items()} if is_folder and all(matches.values()) else {}


def _look(dataset: UnifiedDataset) -> list[Look] | None:
    """Decode every image; None when they are too many for that. Raises: DataError naming those that are damaged."""
    table, names = dataset.table, [row["image"] for row in dataset.rows]
    if sum(width * height for width, height in map(dataset.image_size, range(len(names)))) > MOST_DECODED:
        return None

    def look(name: str) -> Look | DataError:
        try:
            return look_at(resolve(dataset.base_path, name, dataset.allow_outside_base))
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(look, names), "looking at images", len(names), leave=False, delay=2, disable=None))
    for row, error in enumerate(found):
        if isinstance(error, DataError):
            table.blame(row, f"image={plain(names[row], 200)}: {error}")
    table.refuse_bad_rows()
    return found


def _buckets(images: Images, base: Base, given: dict[str, str]) -> tuple[list[Bucket], str, list[str]]:
    """At which sizes images are trained, by the rules of training; what that costs, and what to warn of."""
    sizes = [images.dataset.image_size(row) for row in range(len(images.dataset.rows))]
    both = sizes + ([] if images.classes is None else
                    [images.classes.image_size(row) for row in range(len(images.classes.rows))])
    if "height" in given and "width" in given and given["height"].isdecimal() and given["width"].isdecimal():
        buckets, remedy = [Bucket(int(given["height"]), int(given["width"]))], "Leave out --height and --width"
    else:
        most = int(text) if (text := given.get("max_pixels", "")).isdecimal() else base.side**2
        count = int(text) if (text := given.get("buckets", "")).isdecimal() else None if images.classes is None else 1
        buckets = choose_buckets(both, most, DIVISION_FACTOR, count)
        remedy = f"Give --buckets {2 * len(buckets)} for more sizes, or crop them"
    names = [images.dataset.label(row) for row in range(len(sizes))]
    line, warnings = describe_fit(sizes, names, buckets, remedy)
    return buckets, line.partition(": ")[2], warnings


# -- what is written -------------------------------------------------------------------------------------------------


def _settings(base: Base, fit: Fit | None, images: Images, name: str, given: dict[str, str],
              buckets: list[Bucket]) -> Settings:
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
    size, count = Counter(nearest_bucket(*images.dataset.image_size(k), buckets)
                          for k in range(len(images.dataset.rows))).most_common(1)[0]
    what = f"all at {size}" if len(buckets) == 1 else f"{count} at {size}, others near their own shapes"
    root, _ = found["dataset_base_path"]
    found["dataset_base_path"] = root, f"{_count(len(images.dataset.rows), 'image')}, {what}"
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
    batch = int(text) if (text := given.get("batch_size", "")).isdecimal() and int(text) else base.batch_size
    steps = _steps(base, len(images.dataset), batch)
    shown = steps * batch / len(images.dataset)
    found["max_train_steps"] = steps, f"each image about {shown:.0f} times" if shown >= 1.5 else ""
    found |= {"save_steps": (steps // 4, ""), "output_path": (_free(f"runs/{name}"), ""),
              "resume": ("auto", "after a stop the same command resumes")}
    if base.model_paths:
        found["sample_prompts"] = _sample_prompts(images), "before and after"
    for setting, text in given.items():
        found[setting] = text, found[setting][1] if found.get(setting, ("", ""))[0] == text else ""
    return found


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
    return _three(prompts)


def _three(items: Sequence[Any]) -> list[Any]:
    """The first, one from the middle, and the last."""
    return [items[k] for k in sorted({0, len(items) // 2, len(items) - 1})]


def _head(args: argparse.Namespace, base: Base, fit: Fit | None, images: Images, output: Path) -> list[str]:
    """The comment at the beginning of the file."""
    words = [*images.names, *(["--base", args.base] if args.base != "emoji-flux" else []),
             *(["--device-memory", str(args.memory)] if args.memory else []),
             *(["--trigger", args.trigger] if args.trigger else []),
             *(word for name, text in overrides_of(args).items() for word in (f"--{name}", text)),
             *(["--output", str(args.output)] if args.output else [])]
    where = f"one Ascend 910B with {args.memory or 64} GB, in bfloat16" if fit else "a CPU or an Ascend"
    head = [f"{JOBS[images.job]} of {base.title} on {_count(len(images.dataset.rows), 'image')}, for {where}: "
            f"ms-diffsynth train {shlex.quote(str(output))}{_trust(images)}",
            f"Written by: ms-diffsynth init {shlex.join(words)}"]
    gate = ", once its licence is accepted on its page of the hub and hf auth login was run" if base.is_gated else ""
    more = [f"Memory: {_memory(base, fit)}."] if fit else []
    more += [f"The first run downloads {base.download}{gate}."] if base.download else []
    return [*head, *(line for text in more for line in textwrap.wrap(text, 118))]


def _memory(base: Base, fit: Fit) -> str:
    beside = "" if base.is_cached else f"; the text encoder, which stays loaded, is {base.encoders} more"
    return (f"{fit.peak} GiB at most in a step at {base.side} x {base.side} pixels{beside}; by the stand-in for CANN, "
            "not an NPU (docs/reference/memory.md)")


def _trust(images: Images) -> str:
    return " --trust_template_code" if images.job == "template" else ""


def _slug(args: argparse.Namespace, base: Base) -> str:
    """A name for files, of the folders and the base."""
    names = [re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(path)).name.partition("=")[0]).strip("-.") for path in
             args.folders]
    return "-".join([*(name for name in names if name), *([args.base] if base.files else [])])[:100] or "images"


# -- what is said ----------------------------------------------------------------------------------------------------

Report = list[tuple[str, str]]  # label and text, each a line or more


def _report(images: Images, looks: list[Look] | None, base: Base, config: TrainConfig, tokens: dict[str, int] | None,
            line: str) -> Report:
    """What was found."""
    dataset, count = images.dataset, len(images.dataset.rows)
    sizes = [dataset.image_size(row)[::-1] for row in range(count)]
    names = [dataset.label(row) for row in range(count)]
    order = sorted(range(count), key=lambda row: sizes[row][0] * sizes[row][1])
    least, most = ("{}x{} ({})".format(*sizes[row], names[row]) for row in (order[0], order[-1]))
    kinds = len(set(sizes))
    found: Report = [("images", f"{count} in {', '.join(images.names)}")]
    if config.data.dataset_folders:
        per = Counter(next(f for f in parse_folders(config.data.dataset_folders) if name.startswith(f + os.sep))
                      for name in names)
        repeats = parse_folders(config.data.dataset_folders)
        found.append(("folders", "; ".join(f"{folder}: {_count(n, 'image')}, shown {_times(repeats[folder])} an epoch"
                                           for folder, n in per.items())))
    if looks is not None:
        found.append(("formats", ", ".join(f"{n} {kind}" for kind, n in Counter(look.format for look in looks)
                                           .most_common())))
    found.append(("sizes", f"all {least.split()[0]} pixels" if kinds == 1 else
                  f"{kinds}, from {least} to {most}, height x width"))
    if turned := sum(look.is_turned for look in looks or ()):
        found.append(("turned", f"{turned}, as their EXIF orientation says"))
    if clear := sum(look.is_transparent for look in looks or ()):
        found.append(("transparent", f"{clear}, laid over white"))
    found += [("duplicates", _duplicates(dataset, looks)), *_captions(images, base, tokens)]
    if images.classes is not None:
        found.append(("class images", f"{len(images.classes.rows)} in {config.data.class_base_path}"))
    return [*found, ("trained at", line)]


def _captions(images: Images, base: Base, tokens: dict[str, int] | None) -> Report:
    """Which prompts are trained: how many images have a caption, what the others get, how long they are, and three."""
    dataset, prompts = images.dataset, images.prompts
    count, missing = len(dataset.rows), len(dataset.uncaptioned)
    source = "beside the images" if os.path.isdir(dataset.table.source) else f"in {dataset.table.source}"
    found: Report = [("captions", f"{count - missing} of {count}{f' {source}' if missing < count else ''}"
                      + (f"; {missing} without one use \"{images.prompt}\"" if missing else ""))]
    if "trigger_word" in images.place:
        word, where = images.place["trigger_word"]
        found.append(("trigger", f"\"{word}\", {where}"))
    longest = max(prompts, key=len if tokens is None else tokens.get)
    long = f"{len(longest)} characters" if tokens is None else (
        f"{tokens[longest]} tokens, of {base.tokens} that {base.title} reads")
    what = f"{len(prompts)} different, the longest" if len(prompts) > 1 else "one for all,"
    found.append(("prompts", f"{what} {long}"))
    return [*found, *(("", f"{plain(prompt, 80)}  ({prompts[prompt]})") for prompt in _three(list(prompts)))]


def _tokens(prompts: Iterable[str], base: Base) -> dict[str, int] | None:
    """How many tokens each prompt has as the base reads it, in its template; None where its tokenizer is not here."""
    if base.tokenizer is None:
        return None
    with quiet_imports():
        from transformers import Qwen2Tokenizer, T5Tokenizer

    folder = _bundled(base) / "tokenizer_2" if base.tokenizer == "own" else TOKENIZERS / base.tokenizer
    folder = folder if folder.is_dir() else TOKENIZERS / "t5"  # of a model that has none of its own
    tokenizer = (Qwen2Tokenizer if base.tokenizer == "qwen2" else T5Tokenizer).from_pretrained(folder)
    return {prompt: len(tokenizer(prompt).input_ids) + base.around for prompt in prompts}


def _duplicates(dataset: UnifiedDataset, looks: list[Look] | None) -> str:
    """Images with the same pixels; with the same bytes where they are too many to be decoded."""
    names = [row["image"] for row in dataset.rows]
    keys = ([look.pixels for look in looks] if looks is not None else
            [dataset.content(row, ["image"])["image"][0] for row in range(len(names))])
    first: dict[str, str] = {}
    again = [f"{name} is {first[key]}" for name, key in zip(names, keys) if first.setdefault(key, name) != name]
    how = "" if looks is not None else ", by the bytes of files: the images are too many to be decoded"
    return f"{len(again)}, trained on like the others: {listing(again, 3)}{how}" if again else f"none{how}"


def _plan(args: argparse.Namespace, base: Base, fit: Fit | None, images: Images, config: TrainConfig) -> Report:
    """What the file will train."""
    trained = JOBS[images.job] + ("" if images.job == "template" else f" of rank {config.model.lora_rank}")
    others = f"; others by --base {', '.join(name for name in BASES if name != args.base)}" if base.model_paths else ""
    found: Report = [("base", f"{base.title}, for {base.side} x {base.side} pixels{others}"),
                     ("training", f"{trained}, {config.run.max_train_steps} steps of "
                      f"{_count(config.run.batch_size, 'image')}")]
    if fit:
        memory = args.memory or 64
        found.append(("memory", f"{_memory(base, fit)}; a device of {memory} GB has {DEVICES[memory]} GiB"))
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
               f"and lose their end, such as {plain(cut[0], 90)}. Put what matters first.")


def _next(base: Base, images: Images, config: TrainConfig, output: Path) -> Iterator[str]:
    """The commands that come next."""
    if base.is_gated:
        yield f"hf auth login   # once: {base.title} is gated, accept its licence on its page of the hub first"
    yield f"ms-diffsynth train {shlex.quote(str(output))}{_trust(images)}"
    if images.job == "template":
        yield "# then pack and use it: docs/how_to/templates.md"
        return
    model = base.model_paths or f"{base.family} FOLDER_OF_{base.title}"
    prompt = _sample_prompts(images)[0] or images.prompt
    yield (f"ms-diffsynth sample {model} --lora {config.run.output_path}/step-{config.run.max_train_steps}.safetensors "
           f"--prompt {shlex.quote(prompt)}")


def _lines(report: Report) -> str:
    """Labels in one column, texts beside them."""
    wide = max(len(label) for label, _ in report) + 2
    return "".join(_wrapped(text, f"{label:{wide}}", " " * wide) for label, text in report)


def _wrapped(text: str, first: str = "", others: str = "      ") -> str:
    width = min(max(shutil.get_terminal_size().columns, 60), 110)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=others, break_long_words=False,
                         break_on_hyphens=False) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _as_flag(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextlib.contextmanager
def _noting() -> Iterator[list[str]]:
    """Gathers the warnings of reading data, to be said with the report; what else is said there is in the report."""
    notes: list[str] = []
    log, handler = logging.getLogger("ms_diffsynth.data"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield notes
    finally:
        log.removeHandler(handler)
        log.propagate = before
