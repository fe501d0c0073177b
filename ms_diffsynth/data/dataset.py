"""UnifiedDataset: rows of metadata in, dictionaries with loaded images out; every row is checked first."""
from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import ConfigError, DataError, UserError, listing, nearest
from .buckets import Bucket, BucketCropAndResize, nearest_bucket
from .clips import Clip, Clips, LoadClip
from .folders import Epoch
from .images import SUFFIXES, image_size, read_image
from .loader import permutation
from .metadata import CAPTION_COLUMNS, FURTHER_INPUTS, Table, column_of, read_folder, read_metadata, stem_of
from .operators import (
    DataProcessingOperator,
    ImageCropAndResize,
    LoadImage,
    RouteByType,
    SequentialProcess,
    ToAbsolutePath,
    describe,
    size_after,
)
from .paths import lookalike, open_regular, plain, resolve, shorten
from .prompts import has_word, prompt_problem
from .video import VIDEO_SUFFIXES, Film, film_of, frame_files

logger = logging.getLogger(__name__)

DECODED_AT_ONCE = 64_000_000  # pixels: images of so few together are decoded by the check, which takes about 3 s


def identity(data: Any) -> Any:
    """The cell as it is."""
    return data


class UnifiedDataset:
    """The rows of a metadata file, or of a folder of images with captions, with operators applied to their cells.

    Args:
        base_path: the data folder. The files that a row names are inside it.
        metadata_path: .csv, .json or .jsonl; None: the images below ``base_path`` with .txt or .caption sidecars, or,
            when there are none of these, metadata.csv or metadata.jsonl in that folder.
        repeat: how many times an epoch goes through the rows; or how often it shows each of them, a number a row.
        data_file_keys: columns that name files, as a tuple or "image,edit_image". They must be in every row, but for
            those that are ``optional``. Those without a special operator are images. When ``image`` is required and not
            among them, the first one is the column of the images, unless the metadata have one by its usual name.
        main_data_operator: applied to the cells of ``data_file_keys``.
        special_operator_map: column -> operator, instead of the main one, for any column (not only for files).
        max_data_items: the length of an epoch, instead of rows x repeat.
        required: further columns that must be there, such as ("prompt",).
        optional: columns whose cell may be missing or empty in some rows, which then have None.
        edit_folders: folders inside ``base_path`` with the references of the images, the first one's, the second one's
            and so on, by file name: column ``edit_image``. See `metadata.read_folder`.
        captions: False for images without captions.
        allow_outside_base: let rows name files outside ``base_path`` (a hub cache of links, say), and follow links.
        instance_prompt: the prompt of every row that has none of its own: no sidecar, an empty one, no such key, null,
            an empty cell. Without it what is there and empty is the empty prompt.
        trigger_word: put in front of every prompt that does not have it and is not empty: "sks, a cat on a sofa".
        prompt_setting: what ``instance_prompt`` is called in messages.
        image_column: the column that is the ``image`` of a row; None: image or file_name, in any case of letters.
        caption_column: the column that is its ``prompt``; None: prompt, text or caption; "": none, nor sidecars.
        clips: how rows are taken from films; None: rows are still images. With it the first field of a row is
            ``video`` instead of ``image``: a film, a folder of frames or an image; see `clips`.
        video_column: the column that is the ``video`` of a row; None: video or file_name. Rows without a film may name
            an image in ``image_column``, and all may have ``start``: seconds at which their clip begins.

    Construction reads the header and the end of every image, and decodes them all when they are small together
    (`DECODED_AT_ONCE`). It raises one DataError naming the bad rows, before any model is loaded. What only decoding
    shows (damage in the middle) is raised by ``dataset[i]`` with the row's number where they are more.

    Source: DiffSynth-Studio 2.1.12, ``UnifiedDataset``; there a special operator has no effect on other columns.
    """

    def __init__(
        self,
        base_path: str | None = None,
        metadata_path: str | None = None,
        repeat: int | Sequence[int] = 1,
        data_file_keys: str | Sequence[str] = (),
        main_data_operator: Callable[[Any], Any] = identity,
        special_operator_map: Mapping[str, Callable[[Any], Any]] | None = None,
        max_data_items: int | None = None,
        *,
        required: str | Sequence[str] = (),
        optional: str | Sequence[str] = (),
        edit_folders: Sequence[str] = (),
        captions: bool = True,
        allow_outside_base: bool = False,
        instance_prompt: str | None = None,
        trigger_word: str | None = None,
        prompt_setting: str = "instance_prompt",
        image_column: str | None = None,
        caption_column: str | None = None,
        clips: Clips | None = None,
        video_column: str | None = None,
    ):
        least = repeat if isinstance(repeat, int) else min(repeat, default=1)
        for name, value in (("repeat", least), ("max_data_items", max_data_items)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1. Leave it out to go through all rows once")
        if base_path is None and metadata_path is None:
            raise ConfigError("base_path and metadata_path are both missing; expected one at least. Set base_path")
        self.base_path = os.fspath(base_path or ".")
        self.repeat, self.max_data_items = repeat, max_data_items
        self.clips, self.medium = clips, "image" if clips is None else "video"
        self.data_file_keys = _names(data_file_keys) or ((self.medium,) if metadata_path is None else ())
        self.main_data_operator = main_data_operator
        self.special_operator_map = dict(special_operator_map or {})
        self.allow_outside_base = allow_outside_base
        self.required, self.optional, self.edit_folders = _names(required), _names(optional), tuple(edit_folders)
        self.instance_prompt, self.prompt_setting = instance_prompt, prompt_setting
        self.trigger_word = trigger_word
        self.buckets: Sequence[Bucket] = ()  # see `use_buckets`
        self._present: Epoch | None = None
        self._sizes: dict[str, tuple[int, int]] = {}
        self.films: dict[str, Film] = {}  # by name, images too, where there are clips
        self.uncaptioned: list[int] = []  # rows whose prompt is instance_prompt
        self._written: dict[str, str] = {}  # field of a row -> the column it is in the metadata
        if metadata_path is None and os.path.isfile(os.path.join(self.base_path, "cache.json")):
            self.rows = []  # a cache of split training: launch_training_task reads it for task sft:train
            return
        is_captioned = captions and caption_column != ""
        if metadata_path is None:
            self.table = self._read_folder(is_captioned, video_column or image_column)
        else:
            self.table = read_metadata(os.fspath(metadata_path))
        columns = self.table.columns
        for key in {*self.optional, *(("start",) if clips else ())} & set(columns):
            for row in filter(None, self.table.rows):
                row[key] = None if row.get(key) in (None, "", []) else row[key]
        if clips is not None:
            columns = self._join_columns(columns, video_column, image_column)
            image_column = None
        self._take_columns(columns, image_column, caption_column if is_captioned else "")
        if captions or instance_prompt is not None:
            self._give_prompts([name for name in columns if name.casefold() in CAPTION_COLUMNS
                                and name != self._column("prompt") and caption_column is None])
        if trigger_word is not None:
            self._give_trigger_word()
        self.check(columns)
        if clips is not None:
            self._take_clips()
        self.rows: list[dict] = self.table.rows

    def _read_folder(self, captions: bool, image_column: str | None) -> Table:
        """The images of the folder, or the metadata that are found in it."""
        table = read_folder(self.base_path, captions, self.allow_outside_base, self.edit_folders, self.medium)
        if not table.found:
            return table
        found = read_metadata(table.found)
        kind = self.medium
        if image_column is None and found.rows and column_of(kind, found.columns, found.source) is None:
            logger.warning("%s is not used: it has no column of %ss, %s or file_name; it has %s. Name it by "
                           "dataset_metadata_path, and its column by %s_column, to use it.", table.found, kind, kind,
                           listing(map(plain, found.columns)), kind)
            return table
        logger.info("%s was found in the folder and is used.", table.found)
        found.images = table.images
        return found

    def _join_columns(self, columns: list[str], video_column: str | None, image_column: str | None) -> list[str]:
        """Give rows ``video`` from the column of films or, where that is empty, of images; returns the columns then.

        Raises: DataError when a column is not there.
        """
        source = self.table.source
        for setting, name in (("video_column", video_column), ("image_column", image_column)):
            if name and columns and name not in columns and source != self.base_path:
                raise DataError(f"{source} has no column {plain(name)}, which {setting} names; it has "
                                f"{listing(map(plain, columns))}.{_similar(name, columns, setting)} Correct {setting}")
        video = video_column or column_of("video", columns, source)
        image = image_column or ("image" if "image" in columns else None)
        named = list(dict.fromkeys(name for name in (video, image) if name in columns))
        if not named:
            return columns
        for index, row in enumerate(self.table.rows):
            given = [value for name in named if row and (value := row.pop(name, None)) not in (None, "")]
            if len(given) > 1:
                both = " and ".join(f"{name}={shorten(value)}" for name, value in zip(named, given))
                self.table.blame(index, f"{both}: expected a film or an image. Empty one cell, or give each a row")
            if given:
                row["video"] = given[0]
        self._written["video"] = " or ".join(named)
        return ["video", *(name for name in columns if name not in named)]

    def _take_clips(self) -> None:
        """A row for every clip, with ``clip``: its start, frames and rate. Raises: DataError naming the bad rows."""
        table, begun, uncaptioned = self.table, Table(self.table.source, images=self.table.images), []
        for index, row in enumerate(table.rows):
            name, start = row["video"], row.get("start")
            if isinstance(name, list):
                table.blame(index, f"{self._column('video')}={shorten(name)} is a list; expected the name of one film, "
                            "or of a folder of frames. Give each film a row of its own")
                continue
            try:
                start = None if start is None else float(start)
                if start is not None and not 0 <= start < 10**6:
                    raise ValueError
                found = self.clips.of(name, self.films[name], start)
            except DataError as error:
                table.blame(index, f"{self._column('video')}={shorten(name, 200)}: {error}")
                continue
            except (TypeError, ValueError):
                table.blame(index, f"start={shorten(start)}: expected seconds, 0 or more. Correct it")
                continue
            for clip in found:
                place = f"{table.places[index]}, clip at {clip.start:.4g} s" if len(found) > 1 else table.places[index]
                begun.add(row | {"clip": {"start": clip.start, "frames": clip.frames, "rate": clip.rate}}, place)
            if index in self.uncaptioned:
                uncaptioned += range(len(begun.rows) - len(found), len(begun.rows))
        table.refuse_bad_rows()
        self.table, self.uncaptioned = begun, uncaptioned
        if sum(f.width * f.height * f.frames for f in self.films.values()) <= DECODED_AT_ONCE:
            load = LoadClip(self.base_path, None, self.clips, self.allow_outside_base)
            for index in range(len(begun.rows)):
                try:
                    load(self.clip_of(begun.rows[index]))
                except DataError as error:
                    begun.blame(index, str(error))
            begun.refuse_bad_rows()

    def clip_of(self, row: Mapping[str, Any]) -> Clip:
        """The clip of one of ``rows``."""
        return Clip(row["video"], **row["clip"])

    def _take_columns(self, columns: list[str], image_column: str | None, caption_column: str | None) -> None:
        """Give rows the fields ``image`` and ``prompt``, whatever their columns are called.

        Raises: DataError when a column is not there.
        """
        source, keys = self.table.source, self.data_file_keys
        if source == self.base_path:  # a folder, which has no columns of other names
            if odd := [name for name in (image_column, caption_column) if name]:
                logger.info("%s has no metadata: image_column and caption_column, here %s, are not used.", source,
                            listing(map(plain, odd)))
            image_column, caption_column = None, "" if caption_column == "" else None
        for setting, name in (("image_column", image_column), ("caption_column", caption_column)):
            if name and columns and name not in columns:
                raise DataError(f"{source} has no column {plain(name)}, which {setting} names; it has "
                                f"{listing(map(plain, columns))}.{_similar(name, columns, setting)} Correct {setting}")
        kind = self.medium
        if kind in (*keys, *self.required):
            others = [key for key in keys if key in columns and key not in self.required and kind not in keys]
            found = image_column or column_of(kind, columns, source) or (others[0] if others else kind)
            self.data_file_keys = (kind, *(key for key in keys if key not in (kind, found)))
            if found != kind:
                self._rename(kind, found)
        if caption_column == "":
            for row in filter(None, self.table.rows):
                row.pop("prompt", None)
        elif caption := caption_column or column_of("caption", columns, source):
            self._rename("prompt", caption)

    def _rename(self, field: str, column: str) -> None:
        """Give rows a field that is another column."""
        self._written[field] = column
        for row in filter(None, self.table.rows):
            if column in row:
                row[field] = row[column]
            else:
                row.pop(field, None)

    def _give_prompts(self, unused: list[str]) -> None:
        """``instance_prompt`` for rows without a prompt of their own; without it, note those that have none.

        ``unused``: columns that may hold captions too.
        """
        table, given, empty = self.table, [], []
        if problems := _caption_problems(self.instance_prompt or "", self.prompt_setting):
            raise ConfigError(problems[0])
        is_folder, needed, kind = os.path.isdir(table.source), "prompt" in self.required, self.medium
        for index, row in enumerate(table.rows):
            prompt = None if row is None else row.get("prompt")
            if row is None or (isinstance(prompt, str) and prompt.strip()) or not isinstance(prompt, str | None):
                continue
            if self.instance_prompt is not None:
                row["prompt"] = self.instance_prompt
                given.append(index)
            elif prompt is not None:
                row["prompt"] = ""
                empty.append(index)
            elif is_folder:
                name = row[kind]
                what_to_do = (f"There is {table.lookalikes[index]!r}, which differs in case or Unicode form: rename it"
                              if index in table.lookalikes else
                              f"Write one, or set {self.prompt_setting}, which serves every {kind} without a caption")
                table.blame(index, f"the {kind} {plain(name, 200)} has no caption file; expected "
                            f"{plain(stem_of(name), 200)}.txt beside it. {what_to_do}")
            elif needed and any("prompt" in row for row in filter(None, table.rows)):
                table.blame(index, f"no {self._column('prompt')}. Write one, or set {self.prompt_setting}, which "
                            "serves every row without one")
        self.uncaptioned, own = given, len(table.rows) - len(given)
        if empty:
            logger.warning("%s: %d of %d captions are empty and train the empty prompt, as for guidance: %s. "
                           "%s would serve them instead.", table.source, len(empty), len(table.rows),
                           listing((table.places[i] for i in empty), 5), self.prompt_setting)
        if self.instance_prompt is not None and own:
            logger.info("%s: %d of %d %ss have a caption of their own, %s.", table.source, own, len(table.rows),
                        kind, f"{len(given)} use {self.prompt_setting}" if given else
                        f"{self.prompt_setting} is not used")
        if given and unused:
            logger.warning("%s: the column %s is not used. Set caption_column=%s if it holds the captions.",
                           table.source, listing(map(plain, unused)), plain(unused[0]))
        if missed := [f"{table.lookalikes[i]!r} of {table.rows[i][kind]!r}" for i in given if i in table.lookalikes]:
            logger.warning("%s: these are not read as captions, because their names differ in case or Unicode form "
                           "from those of the images: %s. Rename them to use them.", table.source, listing(missed))

    def _give_trigger_word(self) -> None:
        """Put the trigger word in front of prompts that do not have it."""
        rows = [row for row in self.table.rows if row and isinstance(row.get("prompt"), str) and row["prompt"].strip()]
        lacking = [row for row in rows if not has_word(row["prompt"], self.trigger_word)]
        for row in lacking:
            row["prompt"] = f"{self.trigger_word}, {row['prompt']}"
        logger.info("%s: the trigger word %s is in %d of %d prompts, and was put in front of %d.", self.table.source,
                    self.trigger_word, len(rows) - len(lacking), len(rows), len(lacking))

    def _column(self, field: str) -> str:
        """What a field is called in the metadata."""
        return self._written.get(field, field)

    @classmethod
    def of_folders(cls, base_path: str, folders: Mapping[str, int], **options: Any) -> UnifiedDataset:
        """One data set of several folders inside ``base_path``, each with captions or metadata of its own.

        Args:
            folders: name -> how often an epoch shows its images.
            options: further arguments, the same for each folder. ``repeat``, a number, goes through all of that again.

        Raises: one DataError for all folders.
        """
        parts, problems, again = {}, [], options.pop("repeat", 1)
        for name in folders:
            try:
                parts[name] = cls(os.path.join(base_path, name), **options)
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems))
        whole = copy.copy(next(iter(parts.values())))
        whole.base_path, whole.table, whole._sizes, whole.repeat = base_path, Table(base_path), {}, []
        whole.uncaptioned, whole.films = [], {}
        for name, part in parts.items():
            whole.uncaptioned += [len(whole.table.rows) + row for row in part.uncaptioned]
            for row, place in zip(part.rows, part.table.places):
                inside = {key: _joined(name, row[key]) for key in part.data_file_keys if row.get(key) is not None}
                whole.table.add(row | inside, f"{name} {place}")
                whole.repeat.append(folders[name] * again)
            whole._sizes |= {os.path.join(name, file): size for file, size in part._sizes.items()}
            whole.films |= {os.path.join(name, file): film for file, film in part.films.items()}
        whole.rows = whole.table.rows
        return whole

    def __len__(self) -> int:
        return self.max_data_items or len(self._epoch)

    @property
    def _epoch(self) -> Epoch:
        if self._present is None or self._present.rows != len(self.rows) or self._present.repeat is not self.repeat:
            self._present = Epoch(len(self.rows), self.repeat)
        return self._present

    def row_of(self, index: int) -> int:
        """The row of an item of an epoch, in which a row may come several times; the first items are the rows."""
        return self._epoch.row_of(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row of item ``index``, operators applied. Raises: DataError naming the row and the cell."""
        return self.cells(index)

    def cells(self, index: int, fields: Sequence[str] | None = None) -> dict[str, Any]:
        """The item of a row, or only these fields of it. Raises: as ``dataset[index]``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        number = self.row_of(index % len(self))
        item = {key: cell for key, cell in self.rows[number].items() if fields is None or key in fields}
        for key in dict.fromkeys((*self.data_file_keys, *self.special_operator_map)):
            if key not in item or (item[key] is None and key in self.optional):
                continue
            operator = self.special_operator_map.get(key, self.main_data_operator)
            try:
                item[key] = operator(self.clip_of(self.rows[number]) if key == "video" and self.clips else item[key])
            except Exception as error:  # an operator is the user's code, or meets a damaged file: say in which row
                what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                place = f"{self.table.source} {self.table.places[number]}"
                raise DataError(f"{place}, {key}={item[key]!r}: {what}") from error
        return item

    def size_of(self, index: int, key: str | None = None) -> tuple[int, ...] | None:
        """Height and width of the image of row ``index``, operators applied, by its header; None where that is not
        known before the image is loaded. Of a clip: frames, height and width.
        """
        key = key or self.medium
        if key == "video" and self.clips:
            row, operator = self.rows[self.row_of(index)], self.special_operator_map.get(key, self.main_data_operator)
            size = self._sizes.get(row.get(key)) if key in self.data_file_keys else None
            is_known = size is not None and hasattr(operator, "target_size")
            return (row["clip"]["frames"], *operator.target_size(*size)) if is_known else None
        sizes = self.sizes_of(index, key)
        return sizes[0] if sizes and len(sizes) == 1 else None

    def sizes_of(self, index: int, key: str) -> list[tuple[int, int]] | None:
        """The same of each image of a cell, which may name several, or none."""
        names = _as_list(self.rows[self.row_of(index)].get(key))
        if key not in self.data_file_keys or not all(name in self._sizes for name in names):
            return None
        operator = self.special_operator_map.get(key, self.main_data_operator)
        sizes = [size_after(operator, name, self._sizes[name][::-1]) for name in names]
        return None if None in sizes else sizes

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the first image of item ``index``, upright, known from its header.

        For buckets: ``Loader(dataset, bucket_of=lambda i: nearest_bucket(*dataset.image_size(i), buckets))``.
        """
        row = self.rows[self.row_of(index)]
        for key in sorted(self.data_file_keys, key=lambda key: key != self.medium):
            for value in _as_list(row.get(key)):
                if value in self._sizes:
                    return self._sizes[value]
        raise DataError(
            f"{self.table.source} has no {self.medium} column in data_file_keys={','.join(self.data_file_keys) or '()'}"
            f"; expected the column of the {self.medium}s. Set data_file_keys='{self.medium}'"
        )

    def header_sizes(self, index: int, key: str) -> list[tuple[int, int]]:
        """Width and height in pixels of the images of a column in item ``index``, upright, by their headers."""
        row = self.rows[self.row_of(index)]
        return [self._sizes[value] for value in _as_list(row.get(key)) if value in self._sizes]

    def use_buckets(self, buckets: Sequence[Bucket], operator: Callable[[Any], Any]) -> None:
        """Apply ``operator``, which brings images to these buckets, from now on.

        They were chosen for these and other images, so the size of each is part of `content` and `fingerprint`.
        """
        self.buckets, self.main_data_operator = buckets, operator

    def fingerprint(self) -> str:
        """SHA-256 over all rows and the bytes of all files they name: equal data, equal fingerprint."""
        digest = hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode())
        names = {value for row in self.rows for key in self.data_file_keys for value in _as_list(row.get(key))}
        for name in sorted(names):
            digest.update(self._file_digest(name).encode())
        return digest.hexdigest()

    def split(self, share: float, seed: int) -> tuple[UnifiedDataset, UnifiedDataset]:
        """Two data sets: the rows without a share of them, and that share, chosen by the seed; both in their order.

        Raises: DataError when no row would be left on one side.
        """
        count = len(self.rows)
        held_out = max(1, round(share * count))
        if held_out >= count:
            raise DataError(f"{self.table.source} has {count} rows: a share of {share:g} held out leaves none to train "
                            "on. Expected two rows or more.")
        chosen = set(permutation(count, seed, "held out")[:held_out].tolist())
        return self._only([k for k in range(count) if k not in chosen]), self._only(sorted(chosen))

    def _only(self, rows: list[int]) -> UnifiedDataset:
        part = copy.copy(self)
        part.rows, part.numbers = [self.rows[k] for k in rows], rows
        part.repeat = self.repeat if isinstance(self.repeat, int) else [self.repeat[k] for k in rows]
        part.table = copy.copy(self.table)
        part.table.rows, part.table.places = part.rows, [self.table.places[k] for k in rows]
        return part

    def content(self, index: int, fields: Sequence[str] | None = None) -> dict[str, Any]:
        """What row ``index`` is made of: its cells, and the SHA-256 of the files in place of their names.

        Two rows with the same content give the same item, whatever their files are called. ``fields``: only these.
        """
        row = self.rows[self.row_of(index)]
        found = {}
        for key in row if fields is None else [f for f in fields if f in row]:
            is_file = key in self.data_file_keys
            found[key] = [self._file_digest(v) for v in _as_list(row[key])] if is_file else row[key]
            if key == "video" and self.clips:
                found[key].append(row["clip"])
            if isinstance(row[key], dict):  # a data processor of a template may read the files it names
                found[key] = row[key] | {k: _digest(v) for k, v in row[key].items() if isinstance(v, str)
                                         and 0 < len(v) < 4096 and "\0" not in v and os.path.isfile(v)}
        return found

    def operators(self) -> dict[str, Any]:
        """What is done to the cells, by column, as a JSON value."""
        special = {key: describe(operator) for key, operator in self.special_operator_map.items()}
        return {**dict.fromkeys(self.data_file_keys, describe(self.main_data_operator)), **special}

    def label(self, index: int) -> str:
        """The name of row ``index`` in a message."""
        row = self.rows[self.row_of(index)]
        names = [str(v) for key in self.data_file_keys for v in _as_list(row.get(key))]
        begin = f" from {row['clip']['start']:.4g} s" if row.get("clip", {}).get("start") and self.clips else ""
        return (", ".join(names) or f"row {index + 1}") + begin

    def _file_digest(self, name: str) -> str:
        digest = _digest(resolve(self.base_path, name, self.allow_outside_base))
        is_chosen = self.buckets and name in self._sizes
        return f"{digest} {nearest_bucket(*self._sizes[name], self.buckets)}" if is_chosen else digest

    def check(self, columns: Sequence[str]) -> None:
        """Look at every row and the header of every image. ``columns``: those of the metadata.

        Raises: one DataError with the first ten bad rows.
        """
        table = self.table
        if not table.rows:
            what = f"{self.medium}s" if os.path.isdir(table.source) else "rows below the header"
            raise DataError(f"{table.source} is an empty data set: it has no {what}; expected at least one. Add some")
        fields = table.columns
        missing = [key for key in dict.fromkeys((*self.data_file_keys, *self.required)) if key not in fields]
        is_read = any(row is not None for row in table.rows)
        if missing and is_read and not (missing == ["prompt"] and os.path.isdir(table.source)):
            raise DataError(f"{table.source} has no column {listing(missing)}; it has "
                            f"{listing(map(plain, columns)) or 'none'}."
                            f"{_similar(missing[0], columns)} {self._how_to_name(missing)}")
        faults: dict[tuple[str, bool], str] = {}
        for index, row in enumerate(table.rows):
            if row is not None:
                for problem in self._row_problems(row, columns, faults):
                    table.blame(index, problem)
        table.refuse_bad_rows()
        if self.clips is None and sum(width * height for width, height in self._sizes.values()) <= DECODED_AT_ONCE:
            damaged = {name: problem for name in self._sizes if (problem := self._file_problem(name, True, True))}
            for index, row in enumerate(table.rows if damaged else ()):
                for key in self.data_file_keys:
                    for name in set(_as_list(row.get(key))) & set(damaged):
                        table.blame(index, f"{key}={shorten(name, 200)}: {damaged[name]}")
            table.refuse_bad_rows()
        first: dict[str, int] = {}
        again = [f"{table.places[i]} is {table.places[first[text]]}" for i, row in enumerate(table.rows)
                 if first.setdefault(text := json.dumps(row, sort_keys=True), i) != i]
        if again:
            logger.warning("%s: equal rows are each trained on: %s.", table.source, listing(again))
        if table.images and table.source != self.base_path:
            named = {os.path.normpath(str(value)) for row in table.rows for value in _as_list(row.get(self.medium))}
            if left := [repr(name) for name in table.images if name not in named]:
                logger.warning("%s does not list %d of the %d %ss of the folder, which are not used: %s.",
                               table.source, len(left), len(table.images), self.medium, listing(left))

    def _how_to_name(self, missing: list[str]) -> str:
        """What to do about columns that are not there."""
        row = next(filter(None, self.table.rows), {})
        suffixes, kind = (*SUFFIXES, *(VIDEO_SUFFIXES if self.clips else ())), self.medium
        files = [name for name, value in row.items() if name not in FURTHER_INPUTS
                 and str(value).lower().endswith(suffixes)]
        ways = []
        if kind in missing:
            ways.append(f"Name the column of the {kind}s by {kind}_column"
                        + (f", for example {kind}_column={files[0]}" if files else ""))
        if "prompt" in missing:
            ways.append("Name the column of the prompts by caption_column, or set "
                        f"{self.prompt_setting}, which serves every {kind} without one")
        if set(missing) - {kind, "prompt"}:
            ways.append("Correct data_file_keys, extra_inputs or the metadata")
        return ". ".join(ways)

    def _row_problems(self, row: dict, columns: Sequence[str], faults: dict[tuple[str, bool], str]) -> list[str]:
        lacking = [key for key in columns if key not in row and key != self._column("prompt")]
        problems = []
        if lacking:
            problems.append(f"no {listing(map(plain, lacking))}, which other rows have. Add it")
        if "prompt" in row:
            problems += _caption_problems(row["prompt"], self._column("prompt"))
        if not isinstance(row.get("template_inputs", {}), dict):
            problems.append(f"template_inputs={shorten(row['template_inputs'])}: expected an object such as "
                            '{"scale": 0.2}. Write the metadata as .json or .jsonl')
        for key in self.data_file_keys:
            values, shown = _as_list(row.get(key)), self._column(key)
            if key in self.optional and not values:
                continue
            if key in row and (not values or None in values or "" in values):
                problems.append(f"{shown}={shorten(row[key])} is empty; expected the name of a file. Fill it in")
                continue
            for value in values if key in row else ():
                header = key not in self.special_operator_map or str(value).lower().endswith(SUFFIXES)
                if (cause := str(value), header) not in faults:
                    faults[cause, header] = self._file_problem(value, header)
                if faults[cause, header] and key != self.medium and self._is_several(value):
                    problems.append(f"{shown}={shorten(value, 200)} is no file, and a cell of a CSV names one: several "
                                    f'need JSON lines. Write the metadata as .jsonl, with "{shown}": ["r0.png", '
                                    '"r1.png"] in a row')
                elif faults[cause, header]:
                    problems.append(f"{shown}={shorten(value, 200)}: {faults[cause, header]}")
        return problems

    def _is_several(self, value: object) -> bool:
        """Whether a cell of a CSV is meant as a list, which it cannot be."""
        is_csv = self.table.source.lower().endswith(".csv")
        return is_csv and isinstance(value, str) and (";" in value or value.lstrip().startswith("["))

    def _file_problem(self, value: object, header: bool, whole: bool = False) -> str:
        try:
            path = resolve(self.base_path, value, self.allow_outside_base)
            if whole:
                read_image(path, None)
            elif self.clips is not None:
                self.films[value] = film = film_of(path)
                self._sizes[value] = film.width, film.height
            elif header:
                self._sizes[value] = image_size(path)
            else:
                open_regular(path).close()
        except DataError as error:
            similar = isinstance(value, str) and "does not exist" in str(error) and lookalike(self.base_path, value)
            return f"{error}.{similar}" if similar else str(error)
        return ""

    @staticmethod
    def default_video_operator(base_path: str, clips: Clips, max_pixels: int | None = None, height: int | None = None,
                               width: int | None = None, division_factor: int = 16,
                               buckets: Sequence[Bucket] | None = None, allow_outside_base: bool = False,
                               chosen_by: Mapping[str, Any] | None = None) -> LoadClip:
        """Clip -> uint8 [F, height, width, 3], or of the film's own size, or of its nearest bucket."""
        resize = BucketCropAndResize(buckets, chosen_by) if buckets is not None else ImageCropAndResize(
            height, width, max_pixels, division_factor, division_factor)
        return LoadClip(base_path, resize, clips, allow_outside_base)

    @staticmethod
    def default_image_operator(
        base_path: str = "",
        max_pixels: int | None = 1920 * 1080,
        height: int | None = None,
        width: int | None = None,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
        convert_RGB: bool = True,
        convert_RGBA: bool = False,
        buckets: Sequence[Bucket] | None = None,
        allow_outside_base: bool = False,
        chosen_by: Mapping[str, Any] | None = None,
        resize: bool = True,
    ) -> DataProcessingOperator:
        """File name (or list of them) -> image of height x width, or of its own size, or of its nearest bucket; without
        ``resize`` as it is.
        """
        if buckets is not None and height is not None:
            raise ConfigError(f"height={height} and buckets are both set; expected one of them. Remove one")
        load = ToAbsolutePath(base_path, allow_outside_base) >> LoadImage(convert_RGB, convert_RGBA)
        if resize:
            load = load >> (BucketCropAndResize(buckets, chosen_by) if buckets is not None else ImageCropAndResize(
                height, width, max_pixels, height_division_factor, width_division_factor))
        return RouteByType([(str, load), (list, SequentialProcess(load))])


def _digest(path: str) -> str:
    """SHA-256 of a file, or of the frames in a folder."""
    if os.path.isdir(path):
        names = frame_files(path)
        return hashlib.sha256(json.dumps([[n, _digest(os.path.join(path, n))] for n in names]).encode()).hexdigest()
    status = os.stat(path)
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)  # a film has a row for each of its clips
def _digest_of(path: str, size: int, changed: int) -> str:
    content = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def _names(keys: str | Sequence[str]) -> tuple[str, ...]:
    keys = keys.split(",") if isinstance(keys, str) else keys
    return tuple(key.strip() for key in keys if key.strip())


def _similar(name: str, columns: Sequence[str], setting: str = "") -> str:
    """`nearest` of the columns that can be meant: none that is an input of its own, where another input is missing."""
    is_input = setting in ("image_column", "video_column") or name in ("image", "video", "prompt", *FURTHER_INPUTS)
    others = {*FURTHER_INPUTS, "prompt"} if is_input else FURTHER_INPUTS if setting else {}
    return nearest(name, [column for column in columns if column not in others])


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _joined(folder: str, names: str | list[str]) -> str | list[str]:
    return [os.path.join(folder, name) for name in names] if isinstance(names, list) else os.path.join(folder, names)


def _caption_problems(prompt: object, name: str) -> list[str]:
    if not isinstance(prompt, str):
        return [f"{name}={shorten(prompt)} is of type {type(prompt).__name__}; expected text. Correct it"]
    problem = prompt_problem(prompt)
    return [f"{name}={shorten(prompt)} {problem}"] if problem else []
