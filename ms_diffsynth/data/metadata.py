"""Reading the rows of a data set from CSV, JSON, JSON lines, or a folder of images or films with caption files."""
from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, listing
from .images import SUFFIXES
from .paths import LONGEST_TEXT, fold, plain, read_text, resolve, shorten
from .video import FRAMES_SUFFIX, VIDEO_SUFFIXES

logger = logging.getLogger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption")
IMAGE_COLUMNS = ("image", "file_name")  # DiffSynth-Studio; Hugging Face's imagefolder
VIDEO_COLUMNS = ("video", "file_name")
CAPTION_COLUMNS = ("prompt", "text", "caption")  # the same; and captioning tools
FURTHER_INPUTS = {  # column that a row may have besides its image and prompt -> the models that take it
    "edit_image": "FLUX.1-Kontext, FLUX.2 and Qwen-Image-Edit",
    "control_image": "FLUX.1 and Qwen-Image",
    "control_mask": "FLUX.1 and Qwen-Image",
    "input_image": "Wan models for image to video and Wan2.2-TI2V",
    "end_image": "Wan models for image to video",
    "template_inputs": "FLUX.2 with a template",
}
FOUND = ("metadata.csv", "metadata.jsonl")  # read without being named, as imagefolder does
DEEPEST = 100  # levels of brackets in a row


def models_that_take(names: Iterable[str]) -> str:
    """`` Models that take end_image: ...`` for those of the names that are inputs of some model."""
    return "".join(f" Models that take {n}: {FURTHER_INPUTS[n]}." for n in names if n in FURTHER_INPUTS)


@dataclass
class Table:
    """Rows as they were read. An unreadable row is None and has a problem; ``places`` says where each row stands.

    Of a folder: ``images`` are all that are in it, ``found`` is the path of metadata that speak for them when no image
    has a caption file, and ``lookalikes`` (row -> file) are captions but for the case of their names.
    """

    source: str
    rows: list[dict | None] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: dict[int, list[str]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    found: str = ""
    lookalikes: dict[int, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Every column of any row."""
        return list(dict.fromkeys(key for row in self.rows if row for key in row))

    def add(self, row: dict | None, place: str, problem: str = "") -> None:
        """Append a row, with what is wrong with it."""
        self.rows.append(row)
        self.places.append(place)
        if problem:
            self.blame(len(self.rows) - 1, problem)

    def blame(self, index: int, problem: str) -> None:
        """Note what is wrong with row ``index``."""
        self.problems.setdefault(index, []).append(problem)

    def refuse_bad_rows(self) -> None:
        """Raise one DataError that names the first ten bad rows, three problems of each, and counts them all."""
        if not self.problems:
            return
        bad = sorted(self.problems)
        lines = []
        for i in bad[:10]:
            found = self.problems[i]
            tail = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            text = "; ".join(found[:3]) + tail
            lines.append(f"  {self.places[i]}: {text}{'' if text.endswith(('.', '?', '!')) else '.'}")
        more = [f"  and {len(bad) - 10} more"] if len(bad) > 10 else []
        raise DataError("\n".join([
            f"{len(bad)} of {len(self.rows)} rows of {self.source} cannot be used; every row must be sound:",
            *lines, *more, "Correct or remove these rows, then start again.",
        ]))


def read_metadata(path: str) -> Table:
    """The rows of a .csv, .json (one list of objects) or .jsonl (one object a line) file, UTF-8 with or without BOM.

    Raises: DataError when the file as a whole cannot be read; single bad rows are noted in the table.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise DataError(f"metadata_path={path} ends in '{suffix}'; expected .csv, .json or .jsonl. Convert or rename "
                        "the metadata")
    table = Table(path)
    readers[suffix](read_text(path), table)
    return table


def read_folder(base: str, captions: bool = True, allow_outside: bool = False,
                edit_folders: Sequence[str] = (), medium: str = "image") -> Table:
    """A row for every image below ``base``, sorted: ``image`` and, with ``captions``, ``prompt`` from its sidecar.

    The sidecar of ``cat.png`` is ``cat.txt`` or ``cat.caption``, in this case of letters; a row whose image has none
    has no ``prompt``. Names that begin with a dot are left out; a warning names what else is there and left out: other
    files, and folders that are links (which ``allow_outside`` follows).

    Args:
        edit_folders: folders inside ``base`` whose images are references, listed in ``edit_image``: the first folder
            has the first one of each image, the second the second. ``after/cats/1.png`` has ``before/cats/1.jpg``: what
            is below the uppermost folder is the same, but for the suffix.
        medium: "video" for films too, in the field ``video``: video files, and folders of frames, which are those that
            have a caption beside them (``run.txt`` beside ``run/``) or a name that ends in ``.frames``.
    """
    if not os.path.isdir(base):
        raise DataError(f"{base} is not a folder; expected a folder of {medium}s. Correct dataset_base_path, or which "
                        "setting names it")
    names, others = _walk(base, allow_outside, medium == "video")
    found_references = _references(base, names, edit_folders)
    names = [name for name in names if _inside(name, edit_folders) is None]
    table = Table(base, images=names)
    sidecars = set()
    by_fold: dict[str, list[str]] = {}
    for name in others:
        by_fold.setdefault(fold(name), []).append(name)
    for index, name in enumerate(names):
        stem = stem_of(name)
        beside = [stem + suffix for suffix in CAPTION_SUFFIXES if captions and stem + suffix in others]
        sidecars.update(beside)
        place = f"row {index + 1} ({plain(name, 200)})"
        try:
            prompt = {"prompt": _caption(base, name, beside, allow_outside)} if beside else {}
            table.add({medium: name, **prompt} | ({"edit_image": found_references.get(_key(name))} if edit_folders
                                                   else {}), place)
        except DataError as error:
            table.add(None, place, str(error))
        similar = [other for suffix in CAPTION_SUFFIXES for other in by_fold.get(fold(stem + suffix), ())]
        if captions and similar and not beside:
            table.lookalikes[index] = similar[0]
    if captions and not sidecars:
        found = [name for name in FOUND if name in others]
        if len(found) > 1:
            raise DataError(f"{base} has {' and '.join(found)}; expected one. Name the one that is meant by "
                            f"dataset_metadata_path={os.path.join(base, found[0])}, or remove the other")
        table.found = os.path.join(base, found[0]) if found else ""
        if found and edit_folders:
            raise DataError(f"{table.found} is used with edit_folders={','.join(edit_folders)}: expected references "
                            "either by folders or in metadata. Name them in its column edit_image, or move it")
    left = sorted(repr(name) for name in others if name not in sidecars and os.path.join(base, name) != table.found)
    if left:
        logger.warning("%s: neither %ss nor the captions of one, and not used: %s.", base, medium, listing(left))
    if again := {name for name, count in Counter(map(fold, names)).items() if count > 1}:
        logger.warning("%s: these names differ only in case or Unicode form, and each is %s of its own: %s.",
                       base, "an image" if medium == "image" else "a video",
                       listing(ascii(name) for name in names if fold(name) in again))
    return table


def stem_of(name: str) -> str:
    """What the caption file of an image or a film is called, without its own suffix."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES, FRAMES_SUFFIX) else name


def _walk(base: str, follow: bool, has_films: bool = False) -> tuple[list[str], set[str]]:
    """The images below a folder, or the films too, sorted, and what else is there: paths relative to it."""
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}). Make it a readable folder, or remove it")

    images, others, followed, real = [], set(), set(), os.path.realpath(base)
    for folder, folders, files in os.walk(base, onerror=refuse, followlinks=follow):
        for name in [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            leads_to = os.path.realpath(os.path.join(folder, name))
            if not follow or leads_to in followed or os.path.commonpath([leads_to, real]) in (leads_to, real):
                folders.remove(name)  # a loop, or images that are met without it
                others |= set() if name.startswith(".") else {os.path.relpath(os.path.join(folder, name), base)}
            followed.add(leads_to)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if has_films:
            films = [name for name in folders if name.endswith(FRAMES_SUFFIX)
                     or any(name + suffix in files for suffix in CAPTION_SUFFIXES)]
            folders[:] = [name for name in folders if name not in films]
            images += [os.path.relpath(os.path.join(folder, name), base) for name in films]
        for name in files:
            if not name.startswith("."):
                path = os.path.relpath(os.path.join(folder, name), base)
                if name.lower().endswith((*SUFFIXES, *(VIDEO_SUFFIXES if has_films else ()))):
                    images.append(path)
                else:
                    others.add(path)
    return sorted(images), others


def _inside(name: str, folders: Sequence[str]) -> str | None:
    """That one of ``folders`` which a file is in."""
    return next((folder for folder in folders if name.startswith(os.path.normpath(folder) + os.sep)), None)


def _key(name: str, folder: str | None = None) -> str:
    """What a reference and its image have in common: the path below their folder, without the suffix."""
    inner = name[len(os.path.normpath(folder)) + 1:] if folder else name.partition(os.sep)[2] or name
    return os.path.splitext(inner)[0]


def _references(base: str, names: Sequence[str], folders: Sequence[str]) -> dict[str, list[str]]:
    """The references of each image, by the key of the image.

    Raises: DataError for a folder without images, two references of one name, a later one without the one before, and
        when no image has any.
    """
    found: dict[str, list[str]] = {}
    keys = {_key(name) for name in names if _inside(name, folders) is None}
    for place, folder in enumerate(folders):
        inside = {}
        for name in (name for name in names if _inside(name, folders) == folder):
            if (key := _key(name, folder)) in inside:
                raise DataError(f"{base}: {inside[key]} and {name} are references of one image; expected one in each "
                                "of edit_folders. Remove or rename one")
            inside[key] = name
        if not inside:
            raise DataError(f"{os.path.join(base, folder)} has no images; expected the references of those in {base}. "
                            "Correct edit_folders")
        for key, name in inside.items():
            if key in keys and len(found.setdefault(key, [])) < place:
                raise DataError(f"{base}: {name} has no reference in {folders[len(found[key])]} before it; expected "
                                "one in each of the earlier edit_folders. Add it, or name the folders in another order")
            if key in keys:
                found[key].append(name)
        if left := [repr(name) for key, name in inside.items() if key not in keys]:
            logger.warning("%s: references without an image of that name, and not used: %s.", base, listing(left))
    if folders and not found:
        raise DataError(f"{base}: no image has a reference in {listing(folders)}; expected the same names, as in "
                        f"after/1.png and {folders[0]}/1.png. Rename the files")
    return found


def _caption(base: str, name: str, beside: list[str], allow_outside: bool) -> str:
    if len(beside) > 1:
        raise DataError(f"the image {plain(name, 200)} has two caption files, {' and '.join(map(plain, beside))}. "
                        "Remove one")
    return read_text(resolve(base, beside[0], allow_outside), may_be_empty=True).strip()


def column_of(kind: str, columns: list[str], source: str) -> str | None:
    """The column of the images ("image"), of the films ("video") or of the prompts ("caption") by its usual names, in
    any case of letters.

    Returns: its name as the metadata write it; None when there is none. Raises: DataError when two could be meant.
    """
    usual = {"image": IMAGE_COLUMNS, "video": VIDEO_COLUMNS, "caption": CAPTION_COLUMNS}[kind]
    if usual[0] in columns:
        return usual[0]
    found = [name for name in columns if name.casefold() == usual[0]] or [
        name for name in columns if name.casefold() in usual]
    if len(found) > 1:
        raise DataError(f"{source} has the columns {listing(found)}, each of which may be that of the {kind}s. Say "
                        f"which by {kind}_column, for example {kind}_column={found[0]}")
    return found[0] if found else None


def _read_csv(text: str, table: Table) -> None:
    before = csv.field_size_limit(LONGEST_TEXT)  # of the whole process; other packages change it too
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = None
    try:
        while True:
            place = f"row {len(table.rows) + 1} (line {reader.line_num + 1})"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                table.add(None, place, f"broken CSV ({error}); expected quotes in pairs around whole cells")
                if header is None:
                    return
                continue
            if cells and header is None:
                header = cells
                odd = sorted({*(name for name in cells if not name or name != name.strip()), *_repeated(cells)})
                if odd:
                    raise DataError(
                        f"{table.source} line 1: the column names {shorten(odd)} are empty, repeated or have spaces "
                        "around them; expected plain different names such as image,prompt. Correct the header "
                        f"{plain(','.join(cells), 200)}"
                    )
            elif cells:
                fits = len(cells) == len(header)
                table.add(dict(zip(header, cells)) if fits else None, place, "" if fits else
                          f"{len(cells)} cells {shorten(cells)}; expected {len(header)} as in the header "
                          f"{plain(','.join(header), 200)}. Put quotes around a cell that holds a comma")
    finally:
        csv.field_size_limit(before)


def _read_json(text: str, table: Table) -> None:
    try:
        rows = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{table.source} line {error.lineno} column {error.colno} is not JSON ({error.msg}); the file may be cut "
            "short. Expected a list of objects. Correct it there"
        ) from None
    except RecursionError:
        raise DataError(f"{table.source} is not usable JSON (nested deeper than {DEEPEST} brackets); expected a list "
                        "of flat objects. Correct it") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{table.source} holds one {type(rows).__name__}; expected a list of objects, [{{\"image\": ...}}, ...]. "
            "Put brackets around it, or name the file .jsonl"
        )
    for number, row in enumerate(rows, 1):
        _add_object(table, row, f"row {number}")


def _read_jsonl(text: str, table: Table) -> None:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        place = f"row {len(table.rows) + 1} (line {line})"
        try:
            row = _DECODER.decode(content)
        except (json.JSONDecodeError, RecursionError) as error:
            table.add(None, place, f"not JSON ({error}): {shorten(content)}; expected one whole object on each line")
            continue
        _add_object(table, row, place)


def _add_object(table: Table, row: object, place: str) -> None:
    problem = _wrong_in(row)
    if not problem and not isinstance(row, dict):
        problem = f"a {type(row).__name__}, {shorten(row)}; expected an object such as {{\"image\": \"a.png\"}}"
    table.add(None if problem else row, place, problem)


class _Wrong(str):
    """Replaces, in a row, a value that Python reads as JSON although JSON does not have it; describes the value."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict | _Wrong:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    return _Wrong(f"{listing(map(shorten, _repeated(key for key, _ in pairs)))} comes twice. Remove one")


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _whole(digits: str) -> int | _Wrong:
    try:
        return int(digits)
    except ValueError:  # Python refuses more than 4300 digits, which take long
        return _Wrong(f"a number of {len(digits)} digits. Correct it")


def _decimal(digits: str) -> float | _Wrong:
    number = float(digits)
    return number if math.isfinite(number) else _Wrong(f"{shorten(digits)} is too large for a number. Correct it")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_whole, parse_float=_decimal,
                            parse_constant=lambda name: _Wrong(f"{name} is not a JSON number. Correct it"))


def _wrong_in(value: object, depth: int = 1) -> str:
    """The first thing that is wrong in a JSON value, or an empty string."""
    if isinstance(value, _Wrong):
        return str(value)
    if not isinstance(value, (dict, list)):
        return ""
    if depth > DEEPEST:
        return f"nested deeper than {DEEPEST} brackets; expected a flat object. Correct it"
    inner = value.values() if isinstance(value, dict) else value
    return next((problem for element in inner if (problem := _wrong_in(element, depth + 1))), "")
