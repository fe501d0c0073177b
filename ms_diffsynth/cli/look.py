"""What is in folders of images, as `ms-diffsynth init` reads and reports it. MindSpore is not imported."""
from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ms_diffsynth.config.bases import BASES, Base
from ms_diffsynth.config.settings import SETTINGS
from ms_diffsynth.config.yaml_lines import Written
from ms_diffsynth.data.clips import describe_clips
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.folders import folder_of, folder_problems, parse_folders
from ms_diffsynth.data.images import Look, look_at
from ms_diffsynth.data.pairs import as_list, rows_with_references, some
from ms_diffsynth.data.paths import plain, resolve, shorten
from ms_diffsynth.data.prompts import has_word
from ms_diffsynth.errors import ConfigError, DataError, listing
from ms_diffsynth.hub.bundled import bundled
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

TOKENIZERS = Path(__file__).parents[1] / "pipelines/shared/tokenizers"
MOST_DECODED = 2_000_000_000  # pixels, which takes about 20 s on two cores; of more images only the files are compared
REPEATS_IN_NAME = re.compile(r"(\d{1,2}|100)_(.+)")  # of a folder, as kohya's scripts read it: 10_sks cat

logger = logging.getLogger(__name__)

Settings = dict[str, tuple[Any, str]]  # name -> value and comment
Report = list[tuple[str, str]]  # label and text


@dataclass(kw_only=True)
class Images:
    """The images, and the settings that say where they are.

    Attributes:
        job: what they are for: lora, dreambooth, edit or template.
        prompt: of images without a caption.
        place: settings of the data.
    """

    dataset: UnifiedDataset
    classes: UnifiedDataset | None
    job: str
    prompt: str
    place: Settings

    @property
    def files(self) -> list[str]:
        """Of the images."""
        return [row[self.dataset.medium] for row in self.dataset.rows]

    @property
    def prompts(self) -> dict[str, str]:
        """Each prompt that is trained, and the first image that has it."""
        first: dict[str, str] = {}
        for row in self.dataset.rows:
            first.setdefault(self.with_trigger(row["prompt"]), row[self.dataset.medium])
        return first

    def with_trigger(self, prompt: str) -> str:
        """A prompt as it is trained."""
        word = self.place.get("trigger_word", ("", ""))[0]
        return f"{word}, {prompt}" if word and not has_word(prompt, word) else prompt


def read_images(paths: Sequence[Path], base: Base, word: str | None, given: dict[str, str]) -> Images:
    """The images of folders, and what they are for: that follows from what comes with them.

    Args:
        paths: folders; ``cats=10`` shows the images of ``cats`` ten times in an epoch.
        word: the trigger word; None is "sks", which no caption gets.
        given: settings of the command line.

    Raises: DataError for images, captions or metadata that cannot be trained on.
    """
    root, folders = _folders(paths)
    how: dict[str, Any] = {"image_column": given.get("image_column"), "caption_column": given.get("caption_column"),
                           "data_file_keys": given.get("data_file_keys", "image"), "required": ["image", "prompt"],
                           "allow_outside_base": given.get("allow_outside_base", "false").lower() == "true"}
    if "edit_folders" in given:
        how["edit_folders"] = SETTINGS["edit_folders"].parse(Written(text=given["edit_folders"], place="as a flag"))
    metadata = given.get("dataset_metadata_path")
    if folders and metadata:
        raise ConfigError(f"dataset_metadata_path={metadata} with several folders, each of which has captions or "
                          "metadata of its own: expected one folder. Give the folder that it is about.")

    def read(instance: str) -> UnifiedDataset:
        if folders:
            return UnifiedDataset.of_folders(root, folders, instance_prompt=instance, **how)
        return UnifiedDataset(root, metadata, instance_prompt=instance, **how)

    trigger = word or "sks"
    prompt = given.get("instance_prompt", base.prompt.format(trigger=trigger))
    dataset = read(prompt)
    if not folders and not metadata and (named := _repeats_in_names(dataset)):
        folders, dataset = named, read(prompt)
    named = {match[2] for name in folders if (match := REPEATS_IN_NAME.fullmatch(os.path.basename(name)))}
    if dataset.uncaptioned and word is None and "instance_prompt" not in given and len(named) == 1:
        prompt, = named
        dataset = read(prompt)
    job = ("template" if "template_model_id_or_path" in given else "dreambooth" if "class_base_path" in given else
           "edit" if "edit_image" in dataset.table.columns and "edit" in base.fits else "lora")
    place: Settings = {"dataset_base_path": (root, "")}
    if folders:
        shown = [f"{name}={repeat}" for name, repeat in folders.items()]
        place["dataset_folders"] = shown, "how often an epoch shows an image"
    if metadata:
        place["dataset_metadata_path"] = metadata, ""
    if job in ("edit", "template"):
        extra = "edit_image" if job == "edit" else "template_inputs"
        if extra not in dataset.table.columns:
            raise DataError(f"{dataset.table.source} has no column {extra}, which a template is told: it has "
                            f"{listing(dataset.table.columns)}. Write metadata.jsonl with it "
                            "(docs/how_to/templates.md).")
        if job == "edit":
            how |= {"data_file_keys": "image,edit_image", "optional": "edit_image"}
            dataset = read(prompt)
            place["data_file_keys"] = how["data_file_keys"], ""
        place["extra_inputs"] = extra, ""
    elif "edit_image" in dataset.table.columns:
        logger.warning("edit_image is not used: the bases that are trained to edit are %s.",
                       listing(name for name, other in BASES.items() if "edit" in other.fits))
    if dataset.uncaptioned:
        place["instance_prompt"] = prompt, f"of {counted(len(dataset.uncaptioned), 'image')} without a caption"
    if lacking := sum(not has_word(row["prompt"], word) for row in dataset.rows if word):
        place["trigger_word"] = word, f"put in front of {counted(lacking, 'prompt')}"
    if dataset.uncaptioned and len(named) > 1:
        logger.warning("the names of the folders say different things (%s), but one instance_prompt serves all images "
                       "without a caption: write captions.", listing(sorted(named), 5))
    classes = _classes(given, place, prompt, trigger) if job == "dreambooth" else None
    return Images(dataset=dataset, classes=classes, job=job, prompt=prompt, place=place)


def _classes(given: dict[str, str], place: Settings, prompt: str, trigger: str) -> UnifiedDataset:
    """The class images; those without a caption get the prompt without the first word of the trigger."""
    word = trigger.split()[0]
    usual = re.sub(rf"(?<!\w){re.escape(word)}(?!\w) ?", "", prompt) if len(trigger.split()) > 1 else None
    class_prompt = given.get("class_prompt", usual)
    place["class_base_path"] = given["class_base_path"], "so that the class is not forgotten"
    classes = UnifiedDataset(given["class_base_path"], given.get("class_metadata_path"), data_file_keys="image",
                             required=["image", "prompt"], instance_prompt=class_prompt, prompt_setting="class_prompt")
    if classes.uncaptioned:
        place["class_prompt"] = class_prompt, f"of {counted(len(classes.uncaptioned), 'class image')} without a caption"
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


def look_at_all(dataset: UnifiedDataset) -> list[Look] | None:
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
            table.blame(row, f"image={shorten(names[row], 200)}: {error}")
    table.refuse_bad_rows()
    return found


@contextlib.contextmanager
def noting() -> Iterator[list[str]]:
    """Gathers the warnings of reading data, to be said with the report; what else is said there is in the report."""
    notes: list[str] = []
    log, handler = logging.getLogger("ms_diffsynth"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield notes
    finally:
        log.removeHandler(handler)
        log.propagate = before


def report(images: Images, looks: list[Look] | None, base: Base | None = None,
           tokens: dict[str, int] | None = None) -> Report:
    """What was found.

    Args:
        looks: of `look_at_all`. tokens: of `count_tokens`, for ``base``; None counts characters.
    """
    dataset, count = images.dataset, len(images.dataset.rows)
    sizes = [dataset.image_size(row)[::-1] for row in range(count)]
    names = images.files
    order = sorted(range(count), key=lambda row: sizes[row][0] * sizes[row][1])
    least, most = ("{}x{} ({})".format(*sizes[row], names[row]) for row in (order[0], order[-1]))
    kinds = len(set(sizes))
    found: Report = [(f"{dataset.medium}s", f"{_what(images)} in {images.place['dataset_base_path'][0]}")]
    if repeats := parse_folders(images.place.get("dataset_folders", ((), ""))[0]):
        per = Counter(folder_of(name, repeats) for name in names)
        found.append(("folders", "; ".join(f"{folder}: {counted(n, 'image')}, shown {_times(repeats[folder])} an epoch"
                                           for folder, n in per.items())))
    if looks is not None:
        found.append(("formats", ", ".join(f"{n} {kind}" for kind, n in Counter(look.format for look in looks)
                                           .most_common())))
    found.append(("sizes", f"all {least.split()[0]} pixels" if kinds == 1 else
                  f"{kinds}, from {least} to {most}, height x width"))
    if dataset.clips is not None:
        found += describe_clips(dataset.clips, dataset.films, [dataset.clip_of(row) for row in dataset.rows])[0]
    if turned := sum(look.is_turned for look in looks or ()):
        found.append(("turned", f"{turned}, as their EXIF orientation says"))
    if clear := sum(look.is_transparent for look in looks or ()):
        found.append(("transparent", f"{clear}, laid over white"))
    found.append(("duplicates", _duplicates(dataset, looks)))
    if any("prompt" in row for row in dataset.rows):
        found += _captions(images, base, tokens)
    if images.job == "edit":
        found += references(dataset)
    if images.classes is not None:
        found.append(("class images", f"{len(images.classes.rows)} in {images.classes.base_path}"))
    return found


def references(dataset: UnifiedDataset) -> Report:
    """How many rows have reference images, and three of them."""
    given = {row: dataset.rows[row]["edit_image"] for row in rows_with_references(dataset)}
    counts = sorted({len(as_list(names)) for names in given.values()})
    found = [("references", f"{len(given)} of {len(dataset.rows)} rows have references" + (
        f", {' or '.join(map(str, counts))} each; these for example" if given else ""))]
    return [*found, *(("", f"{' + '.join(plain(name, 40) for name in as_list(given[row]))} -> "
                       f"{plain(dataset.rows[row]['image'], 40)}") for row in some(list(given)))]


def _what(images: Images) -> str:
    """How many rows, and of films which of them are still images."""
    count = len(images.dataset.rows)
    if images.dataset.clips is None:
        return str(count)
    films = {name: images.dataset.films[name] for name in images.files}
    still = sum(film.frames == 1 for film in films.values())
    also = f" and {counted(still, 'image')}" if still else ""
    return f"{len(films) - still}{also}" + ("" if count == len(films) else f", {counted(count, 'clip')} of them,")


def _captions(images: Images, base: Base | None, tokens: dict[str, int] | None) -> Report:
    """Which prompts are trained: how many images have a caption, what the others get, how long they are, and three."""
    dataset, prompts = images.dataset, images.prompts
    count, missing = len(dataset.rows), len(dataset.uncaptioned)
    source = " beside the images" if os.path.isdir(dataset.table.source) else f" in {dataset.table.source}"
    found: Report = [("captions", f"{count - missing} of {count}"
                      + (source if missing < count and "dataset_folders" not in images.place else "")
                      + (f"; {missing} without one use \"{images.prompt}\"" if missing else ""))]
    if "trigger_word" in images.place:
        word, where = images.place["trigger_word"]
        found.append(("trigger", f"\"{word}\", {where}"))
    longest = max(prompts, key=len if tokens is None else tokens.get)
    long = f"{len(longest)} characters" if tokens is None else (
        f"{tokens[longest]} tokens, of {base.tokens} that {base.title} reads")
    what = f"{len(prompts)} different, the longest" if len(prompts) > 1 else "one for all,"
    found.append(("prompts", f"{what} {long}"))
    return [*found, *(("", f"{plain(prompt, 80)}  ({prompts[prompt]})") for prompt in three(list(prompts)))]


def count_tokens(prompts: Iterable[str], base: Base) -> dict[str, int] | None:
    """How many tokens each prompt has as the base reads it, in its template; None where its tokenizer is not here."""
    if base.tokenizer is None:
        return None
    with quiet_imports():
        from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

    folder = bundled_folder(base) / "tokenizer_2" if base.tokenizer == "own" else TOKENIZERS / base.tokenizer
    folder = folder if folder.is_dir() else TOKENIZERS / "t5"  # of a model that has none of its own
    kinds = {"clip": CLIPTokenizer, "qwen2": Qwen2Tokenizer}
    tokenizer = kinds.get(base.tokenizer, T5Tokenizer).from_pretrained(folder)
    return {prompt: len(tokenizer(prompt).input_ids) + base.around for prompt in prompts}


def _duplicates(dataset: UnifiedDataset, looks: list[Look] | None) -> str:
    """Images with the same pixels; with the same bytes where they are too many to be decoded."""
    medium = dataset.medium
    names = [row[medium] for row in dataset.rows]
    keys: list[Any] = [look.pixels for look in looks or ()]
    if looks is None:  # files of one size are read
        keys = [os.path.getsize(resolve(dataset.base_path, name, dataset.allow_outside_base)) for name in names]
        count = Counter(keys)
        keys = [size if count[size] == 1 else dataset.content(row, [medium])[medium][0]
                for row, size in enumerate(keys)]
    first: dict[Any, str] = {}
    again = [f"{name} is {first[key]}" for name, key in zip(names, keys) if first.setdefault(key, name) != name]
    how = "" if looks is not None else ", by the bytes of their files"
    return f"{len(again)}, trained on like the others: {listing(again, 3)}{how}" if again else f"none{how}"


def three(items: Sequence[Any]) -> list[Any]:
    """The first, one from the middle, and the last."""
    return [items[k] for k in sorted({0, len(items) // 2, len(items) - 1})]


def bundled_folder(base: Base) -> Path:
    return bundled(base.model_paths) or Path(base.model_paths)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def lines(report: Report) -> str:
    """Labels in one column, texts beside them."""
    wide = max(len(label) for label, _ in report) + 2
    return "".join(wrapped(text, f"{label:{wide}}", " " * wide) for label, text in report)


def wrapped(text: str, first: str = "", others: str = "      ") -> str:
    """The text in lines of the terminal's width; what is a line of its own in it stays one."""
    width = min(max(shutil.get_terminal_size().columns, 60), 110)
    begins = [first, *[others] * text.count("\n")]
    return "".join(textwrap.fill(line, width, initial_indent=begin, subsequent_indent=others, break_long_words=False,
                                 break_on_hyphens=False) + "\n" for begin, line in zip(begins, text.split("\n")))
