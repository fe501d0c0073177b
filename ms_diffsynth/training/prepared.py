"""The prepared half of every row, computed when it is first needed, and kept: exactly the slots that cross the cut."""
from __future__ import annotations

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_diffsynth.data.folders import Epoch
from ms_diffsynth.data.loader import Batch
from ms_diffsynth.errors import DataError, UserError
from ms_diffsynth.launch.worker import still
from ms_diffsynth.pipeline import Pipeline, pad_prompts, padded_to
from ms_diffsynth.pipelines.shared.cuts import Cuts
from ms_diffsynth.program import Cut
from ms_diffsynth.progress import Progress
from ms_diffsynth.storage.cache import Cache, Entry
from ms_diffsynth.training.kept import Kept
from ms_diffsynth.training.module import DiffusionTrainingModule


@dataclass(frozen=True)
class PreparedRow:
    """What the step needs of one row."""

    slots: dict[str, np.ndarray]  # without batch axis
    size: tuple[int, ...]  # of the image in pixels: (height, width); of a video (frames, height, width)
    bucket: tuple[int, ...]  # rows of one bucket may share a batch; see `in_bucket`


class PreparedRows:
    """A data set whose items are prepared rows, each prepared when it is first asked for, and kept.

    Args:
        dataset: rows of images and captions; several items of an epoch may be one row, see `row_of`.
        module, cut: what prepares, and for which job.
        limit_bytes: rows beyond this much memory are written to files, see `keep_in`; without, prepared again at every
            use.

    Attributes:
        made, seconds: how many rows were prepared, and how long all but the first of them took.
    """

    def __init__(self, dataset: Any, module: DiffusionTrainingModule, cut: Cut, limit_bytes: int = 8 << 30):
        self.dataset, self.module, self.cut, self.limit_bytes = dataset, module, cut, limit_bytes
        self.rows = _count(dataset)
        self.kept, self.cuts = Kept(limit_bytes), Cuts()
        self.made, self.seconds = 0, 0.0
        self._buckets: dict[int, tuple[int, ...]] = {}
        self._lengths: dict[str, int | None] = {}  # of prompts
        self.dtypes: dict[str, set[str]] = {}  # slot -> those that were met
        self._as_float: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.dataset)

    def row_of(self, index: int) -> int:
        """The row of an item."""
        return row_of(self.dataset, index)

    def __getitem__(self, index: int) -> PreparedRow:
        row = self.row_of(index)
        slots, size = self._load(row)
        for name, array in slots.items():
            self.dtypes.setdefault(name, set()).add(array.dtype.name)
        slots = {n: a.astype(np.float32) if n in self._as_float else a for n, a in slots.items()}
        prepared = in_bucket(slots, size, self.module.pipe)
        if self._buckets.setdefault(row, prepared.bucket) != prepared.bucket:
            raise DataError(f"{self.label(row)} has changed since the data were checked: it is now of the shape "
                            f"{prepared.bucket}, it was {self._buckets[row]}. Put it back, or start again.")
        return prepared

    def keep_in(self, folder: Path) -> None:
        """Write rows that do not fit into memory to files of this folder, until `close`."""
        self.kept.folder = folder

    def close(self) -> None:
        """Remove the files, and say which prompts were cut."""
        self.kept.close()
        self.cuts.tell()

    def use_float32(self, names: Collection[str]) -> None:
        """Give these slots of every row as float32: of a template, where a row has 1 and another one 0.5."""
        self._as_float = frozenset(names)

    def bucket_of(self, index: int) -> tuple[int, ...]:
        """The bucket of an item; see `PreparedRow`. It is prepared for that only where `foresees_buckets` is False."""
        row = self.row_of(index)
        if row not in self._buckets:
            if self.foresees_buckets:
                length = self._padded_length(row)
                self._buckets[row] = (*self.dataset.size_of(row), *([] if length is None else [length]))
            else:
                self[row]
        return self._buckets[row]

    @functools.cached_property
    def foresees_buckets(self) -> bool:
        """Whether buckets follow from the headers of the images and the tokens of the prompts."""
        is_further = bool(set(self.cut.cache) & _further(self.module.pipe))
        if is_further or not hasattr(self.dataset, "size_of") or self.dataset.size_of(0) is None:
            return False
        return not self.has_lengths or (self.module.row_fields is not None and self._padded_length(0) is not None)

    @property
    def has_values(self) -> bool:
        """Whether slots hold values of a further input as they are, of a template say: their dtypes differ by row."""
        further = _further(self.module.pipe) & set(self.cut.cache)
        return any(further & set(unit.output_params) and set(unit.onload_model_names) <= {"template_model"}
                   for unit in self.cut.prepare)

    @property
    def has_lengths(self) -> bool:
        """Whether slots are padded, by the tokens of the prompt."""
        return bool(set(self.cut.cache) & set(self.module.pipe.padded_slots))

    def _padded_length(self, row: int) -> int | None:
        if not self.has_lengths:
            return None
        prompt = self.dataset.cells(row, ["prompt"])["prompt"]
        if prompt not in self._lengths:
            with Cuts().of(""):  # told when the row is prepared
                self._lengths[prompt] = self.module.padded_length(prompt, self.cut)
        length = self._lengths[prompt]
        return None if length is None else padded_to(length, self.module.pipe)

    def label(self, row: int) -> str:
        """What to call a row in a message."""
        return label_of(self.dataset, row)

    def _load(self, row: int) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """The slots of a row and the size of its image, kept or prepared now."""
        kept, texts = self.kept.get(f"row {row}"), self.module.texts
        if kept is not None and not kept.text:
            return kept.slots, kept.size
        if kept is not None and texts is not None and (text := texts.get(kept.text)) is not None:
            return kept.slots | text.slots, kept.size
        still()
        if texts is None:
            self.module.texts = self.kept  # of all data sets of the module, in the room of this one
        began = time.perf_counter()
        with self.cuts.of(self.label(row)):
            slots, size = prepare_row(self.dataset, row, self.module, self.cut)
        self.made, self.seconds = self.made + 1, self.seconds + (time.perf_counter() - began if self.made else 0)
        text, shared = getattr(slots, "text", ("", ()))
        self.kept.put(f"row {row}", {n: a for n, a in slots.items() if n not in shared}, size, text)
        if self.made == self.rows:
            self.cuts.tell()
        return slots, size


class CachedRows(PreparedRows):
    """The same, read from a cache instead of prepared; no model of the prepared half is needed.

    Args:
        cache: checked by `storage.cache.Cache.check`. name: ``"instance"`` or ``"class"``.
        repeat: how many times an epoch goes through the rows; or how often it shows each of them, a number a row.
    """

    foresees_buckets, has_values, has_lengths = True, False, False  # the manifest tells shapes and dtypes

    def __init__(self, cache: Cache, name: str, module: DiffusionTrainingModule, repeat: int | Sequence[int] = 1,
                 limit_bytes: int = 8 << 30):
        self.cache, self.planned = cache, cache.rows(name)
        super().__init__(Epoch(len(self.planned), repeat), module, None, limit_bytes)
        self.rows = len(self.planned)
        for slots in {row.key: cache.kind(row.key).slots for row in self.planned}.values():
            for name, (dtype, _) in slots.items():
                self.dtypes.setdefault(name, set()).add(dtype)

    def keep_in(self, folder: Path) -> None:
        """They are in files already."""

    def bucket_of(self, index: int) -> tuple[int, ...]:
        row = self.row_of(index)
        if row not in self._buckets:
            size, slots = self.cache.kind(self.planned[row].key)
            shapes = {name: shape for name, (_, shape) in slots.items()}
            self._buckets[row] = bucket(shapes, size, self.module.pipe)
        return self._buckets[row]

    def label(self, row: int) -> str:
        return self.planned[row].label

    def _load(self, row: int) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        found = self._entry(self.planned[row].key, self.label(row))
        return found.slots | (self._entry(found.text, self.label(row)).slots if found.text else {}), found.size

    def _entry(self, key: str, label: str) -> Entry:
        """An entry, read once while it fits into memory. Raises: CacheError."""
        found = self.kept.get(key)
        if found is None:
            still()
            found = self.cache.entry(key, label)
            self.kept.put(key, *found)
        return found


def prepare_all(sets: Sequence[PreparedRows], progress: Progress) -> None:
    """Prepare every row of the data sets now."""
    progress.begin(sum(rows.rows for rows in sets), "preparing", "row")
    for rows in sets:
        for row in range(rows.rows):
            rows[row]
            progress.advance()
    progress.end()


def unify(sets: Sequence[PreparedRows]) -> None:
    """Give numbers of one slot in one dtype, so far as the dtypes of the rows are known."""
    met: dict[str, set[str]] = {}
    for rows in sets:
        for name, dtypes in rows.dtypes.items():
            met.setdefault(name, set()).update(dtypes)
    if mixed := [name for name, dtypes in met.items() if len(dtypes) > 1]:
        for rows in sets:
            rows.use_float32(mixed)


def prepare_row(dataset: Any, row: int, module: DiffusionTrainingModule,
                cut: Cut) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """The prepared slots of a row and its size. Raises: what preparing raises, with the name of the row in front."""
    data = dataset[row]
    try:
        return module.prepare(data, cut), image_size(data)
    except UserError as error:
        raise type(error)(f"{label_of(dataset, row)}: {error}") from error


def label_of(dataset: Any, row: int) -> str:
    """What to call row ``row`` of a data set in a message."""
    return dataset.label(row) if hasattr(dataset, "label") else f"row {row + 1}"


def rows_of(batch: Batch, dataset: Any, class_dataset: Any = None) -> list[dict[str, Any]]:
    """The rows of a batch, on all ranks, as their owner knows them: the row of the metadata, counted from 1, its files,
    and the number of the sample in the whole run. Class images come last and have a field of their own.
    """
    indices, samples = (numbers.tolist() for numbers in batch.everywhere)
    half = len(indices) if class_dataset is None else len(indices) // 2
    found = []
    for k, (index, sample) in enumerate(zip(indices, samples)):
        source, kind = (dataset, {}) if k < half else (class_dataset, {"set": "class"})
        row = row_of(source, index)
        numbers = getattr(getattr(source, "dataset", source), "numbers", None)  # others may be held out
        number = row if numbers is None else numbers[row]
        found.append({"row": number + 1, "name": label_of(source, row), "sample": sample} | kind)
    return found


def name_row(row: dict[str, Any]) -> str:
    """``cat.png (row 3, sample 17)`` for one of `rows_of`."""
    number, kind = f"row {row['row']}", "class image " if "set" in row else ""
    place = "" if row["name"] == number else f"{number}, "
    return f"{kind}{row['name']} ({place}sample {row['sample']})"


def row_of(dataset: Any, index: int) -> int:
    """The row of an item of a data set, which counts on into the next epochs."""
    return dataset.row_of(index) if hasattr(dataset, "row_of") else index % _count(dataset)


def _count(dataset: Any) -> int:
    """Rows, each counted once, however often an epoch shows it."""
    rows = getattr(dataset, "rows", dataset)
    return rows if isinstance(rows, int) else min(len(rows), len(dataset))


def image_size(data: dict[str, Any]) -> tuple[int, ...]:
    """The size of a row's image in pixels: (height, width), or of its video: (frames, height, width)."""
    if data.get("video") is not None:
        return tuple(data["video"].shape[:3])
    return data["image"].size[1], data["image"].size[0]


def in_bucket(slots: dict[str, np.ndarray], size: tuple[int, ...], pipe: Pipeline) -> PreparedRow:
    """A row as the step takes it: the slots of varying length padded; see `pipeline.pad_prompts`.

    Raises: DataError when a row is longer than the longest.
    """
    shapes = {name: array.shape for name, array in slots.items()}
    return PreparedRow(pad_prompts(pipe, slots)[0], size, bucket(shapes, size, pipe))


def bucket(shapes: Mapping[str, tuple[int, ...]], size: tuple[int, ...], pipe: Pipeline) -> tuple[int, ...]:
    """The bucket of a row with slots of these shapes and an image of this size.

    Rows of one size share a batch when further inputs (edit images, a template's values) have the same shapes too.

    Raises: DataError when a row is longer than the longest.
    """
    padded = [shapes[name][0] for name in pipe.padded_slots if name in shapes]
    further = [side for name in sorted(_further(pipe) & set(shapes)) for side in shapes[name]]
    return (*size, *([padded_to(max(padded), pipe)] if padded else []), *further)


def _further(pipe: Pipeline) -> set[str]:
    """Slots that come of further inputs."""
    return {name for units in pipe.optional_units.values() for unit in units for name in unit.output_params}
