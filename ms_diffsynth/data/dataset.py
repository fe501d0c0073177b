"""UnifiedDataset: rows of metadata in, dictionaries with loaded images out; every row is checked first."""
from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, DataError, UserError, listing, nearest
from .buckets import Bucket, BucketCropAndResize
from .images import SUFFIXES, image_size
from .loader import permutation
from .metadata import read_folder, read_metadata
from .operators import (
    DataProcessingOperator,
    ImageCropAndResize,
    LoadImage,
    RouteByType,
    SequentialProcess,
    ToAbsolutePath,
    describe,
)
from .paths import open_regular, plain, resolve, shorten
from .prompts import prompt_problem

logger = logging.getLogger(__name__)


def identity(data: Any) -> Any:
    """The cell as it is."""
    return data


class UnifiedDataset:
    """The rows of a metadata file, or of a folder of images with captions, with operators applied to their cells.

    Args:
        base_path: the data folder. The files that a row names are inside it.
        metadata_path: .csv, .json or .jsonl; None: the images below ``base_path`` with .txt or .caption sidecars.
        repeat: how many times an epoch goes through the rows.
        data_file_keys: columns that name files, as a tuple or "image,edit_image". They must be in every row. Those
            without a special operator are images.
        main_data_operator: applied to the cells of ``data_file_keys``.
        special_operator_map: column -> operator, instead of the main one, for any column (not only for files).
        max_data_items: the length of an epoch, instead of rows x repeat.
        required: further columns that must be there, such as ("prompt",).
        captions: False for a folder of images without captions.
        allow_outside_base: let rows name files outside ``base_path`` (a hub cache of links, say).

    Construction reads the header and the end of every image and raises one DataError naming the bad rows, before any
    model is loaded. What only decoding shows (damage in the middle) is raised by ``dataset[i]`` with the row's number.

    Source: DiffSynth-Studio 2.1.12, ``UnifiedDataset``; there a special operator has no effect on other columns.
    """

    def __init__(
        self,
        base_path: str | None = None,
        metadata_path: str | None = None,
        repeat: int = 1,
        data_file_keys: str | Sequence[str] = (),
        main_data_operator: Callable[[Any], Any] = identity,
        special_operator_map: Mapping[str, Callable[[Any], Any]] | None = None,
        max_data_items: int | None = None,
        *,
        required: str | Sequence[str] = (),
        captions: bool = True,
        allow_outside_base: bool = False,
    ):
        for name, value in (("repeat", repeat), ("max_data_items", max_data_items)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1. Leave it out to go through all rows once")
        if base_path is None and metadata_path is None:
            raise ConfigError("base_path and metadata_path are both missing; expected one at least. Set base_path")
        self.base_path = os.fspath(base_path or ".")
        self.repeat, self.max_data_items = repeat, max_data_items
        self.data_file_keys = _names(data_file_keys) or (("image",) if metadata_path is None else ())
        self.main_data_operator = main_data_operator
        self.special_operator_map = dict(special_operator_map or {})
        self.allow_outside_base = allow_outside_base
        self.required = _names(required)
        self._sizes: dict[str, tuple[int, int]] = {}
        if metadata_path is None and os.path.isfile(os.path.join(self.base_path, "cache.json")):
            self.rows = []  # a cache of split training: launch_training_task reads it for task sft:train
            return
        if metadata_path is None:
            self.table = read_folder(self.base_path, captions)
        else:
            self.table = read_metadata(os.fspath(metadata_path))
        self.check()
        self.rows: list[dict] = self.table.rows

    def __len__(self) -> int:
        return self.max_data_items or len(self.rows) * self.repeat

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index`` modulo the number of rows, operators applied. Raises: DataError naming the row and the cell."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        number = index % len(self) % len(self.rows)
        item = dict(self.rows[number])
        for key in dict.fromkeys((*self.data_file_keys, *self.special_operator_map)):
            if key not in item:
                continue
            operator = self.special_operator_map.get(key, self.main_data_operator)
            try:
                item[key] = operator(item[key])
            except Exception as error:  # an operator is the user's code, or meets a damaged file: say in which row
                what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                place = f"{self.table.source} {self.table.places[number]}"
                raise DataError(f"{place}, {key}={item[key]!r}: {what}") from error
        return item

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the first image of item ``index``, upright, known from its header.

        For buckets: ``Loader(dataset, bucket_of=lambda i: nearest_bucket(*dataset.image_size(i), buckets))``.
        """
        row = self.rows[index % len(self.rows)]
        for key in self.data_file_keys:
            for value in _as_list(row[key]):
                if value in self._sizes:
                    return self._sizes[value]
        raise DataError(
            f"{self.table.source} has no image column in data_file_keys={','.join(self.data_file_keys) or '()'}; "
            "expected the column of the images. Set data_file_keys='image'"
        )

    def fingerprint(self) -> str:
        """SHA-256 over all rows and the bytes of all files they name: equal data, equal fingerprint."""
        digest = hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode())
        names = {value for row in self.rows for key in self.data_file_keys for value in _as_list(row[key])}
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
        part.table = copy.copy(self.table)
        part.table.rows, part.table.places = part.rows, [self.table.places[k] for k in rows]
        return part

    def content(self, index: int, fields: Sequence[str] | None = None) -> dict[str, Any]:
        """What row ``index`` is made of: its cells, and the SHA-256 of the files in place of their names.

        Two rows with the same content give the same item, whatever their files are called. ``fields``: only these.
        """
        row = self.rows[index % len(self.rows)]
        found = {}
        for key in row if fields is None else [f for f in fields if f in row]:
            is_file = key in self.data_file_keys
            found[key] = [self._file_digest(v) for v in _as_list(row[key])] if is_file else row[key]
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
        row = self.rows[index % len(self.rows)]
        names = [str(v) for key in self.data_file_keys for v in _as_list(row.get(key))]
        return ", ".join(names) or f"row {index + 1}"

    def _file_digest(self, name: str) -> str:
        return _digest(resolve(self.base_path, name, self.allow_outside_base))

    def check(self) -> None:
        """Look at every row and the header of every image. Raises: one DataError with the first ten bad rows."""
        table = self.table
        if not table.rows:
            what = "images" if os.path.isdir(table.source) else "rows below the header"
            raise DataError(f"{table.source} is an empty data set: it has no {what}; expected at least one. Add some")
        columns = list(dict.fromkeys(key for row in table.rows if row for key in row))
        wanted = (*self.data_file_keys, *self.required)
        missing = [key for key in wanted if key not in columns]
        if missing and columns:
            raise DataError(
                f"{table.source} has no column {listing(missing)}; it has {listing(map(plain, columns))}."
                f"{nearest(missing[0], columns)} Correct data_file_keys or the metadata"
            )
        faults: dict[tuple[str, bool], str] = {}
        for index, row in enumerate(table.rows):
            if row is not None:
                for problem in self._row_problems(row, columns, faults):
                    table.blame(index, problem)
        table.refuse_bad_rows()
        first: dict[str, int] = {}
        again = [f"{table.places[i]} is {table.places[first[text]]}" for i, row in enumerate(table.rows)
                 if first.setdefault(text := json.dumps(row, sort_keys=True), i) != i]
        if again:
            logger.warning("%s: equal rows are each trained on: %s.", table.source, listing(again))

    def _row_problems(self, row: dict, columns: list[str], faults: dict[tuple[str, bool], str]) -> list[str]:
        lacking = [key for key in columns if key not in row]
        problems = []
        if lacking:
            problems.append(f"no {listing(map(plain, lacking))}, which other rows have. Add it")
        if "prompt" in row:
            problems += _caption_problems(row["prompt"])
        if not isinstance(row.get("template_inputs", {}), dict):
            problems.append(f"template_inputs={shorten(row['template_inputs'])}: expected an object such as "
                            '{"scale": 0.2}. Write the metadata as .json or .jsonl')
        for key in self.data_file_keys:
            values = _as_list(row.get(key))
            if key in row and (not values or None in values or "" in values):
                problems.append(f"{key}={shorten(row[key])} is empty; expected the name of a file. Fill it in")
                continue
            for value in values if key in row else ():
                header = key not in self.special_operator_map or str(value).lower().endswith(SUFFIXES)
                if (cause := str(value), header) not in faults:
                    faults[cause, header] = self._file_problem(value, header)
                if faults[cause, header]:
                    problems.append(f"{key}={shorten(value, 200)}: {faults[cause, header]}")
        return problems

    def _file_problem(self, value: object, header: bool) -> str:
        try:
            path = resolve(self.base_path, value, self.allow_outside_base)
            if header:
                self._sizes[value] = image_size(path)
            else:
                open_regular(path).close()
        except DataError as error:
            return str(error)
        return ""

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
    ) -> DataProcessingOperator:
        """File name (or list of them) -> image of height x width, or of its own size, or of its nearest bucket."""
        if buckets and height is not None:
            raise ConfigError(f"height={height} and buckets are both set; expected one of them. Remove one")
        resize = BucketCropAndResize(buckets) if buckets else ImageCropAndResize(
            height, width, max_pixels, height_division_factor, width_division_factor)
        load = ToAbsolutePath(base_path, allow_outside_base) >> LoadImage(convert_RGB, convert_RGBA) >> resize
        return RouteByType([(str, load), (list, SequentialProcess(load))])


def _digest(path: str) -> str:
    content = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def _names(keys: str | Sequence[str]) -> tuple[str, ...]:
    keys = keys.split(",") if isinstance(keys, str) else keys
    return tuple(key.strip() for key in keys if key.strip())


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _caption_problems(prompt: object) -> list[str]:
    if not isinstance(prompt, str):
        return [f"prompt={shorten(prompt)} is of type {type(prompt).__name__}; expected text. Correct it"]
    problem = prompt_problem(prompt)
    return [f"prompt={shorten(prompt)} {problem}"] if problem else []
