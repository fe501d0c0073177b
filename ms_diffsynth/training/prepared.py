"""The prepared half of every row, computed once and kept: exactly the slots that cross the cut."""
from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ms_diffsynth.data.loader import Batch
from ms_diffsynth.errors import UserError
from ms_diffsynth.launch.worker import still
from ms_diffsynth.pipeline import Pipeline, pad_prompts
from ms_diffsynth.pipelines.shared.cuts import counted_cuts
from ms_diffsynth.program import Cut
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRow:
    """What the step needs of one row."""

    slots: dict[str, np.ndarray]  # without batch axis
    size: tuple[int, ...]  # of the image in pixels: (height, width)
    bucket: tuple[int, ...]  # rows of one bucket may share a batch; see `in_bucket`


class PreparedRows:
    """A data set whose items are prepared rows.

    Args:
        dataset: rows of images and captions; item ``i`` and item ``i + rows`` are the same row.
        module, cut: what prepares, and for which job.
        limit_bytes: rows beyond this much memory are prepared again at every use.
    """

    def __init__(self, dataset: Any, module: DiffusionTrainingModule, cut: Cut, limit_bytes: int = 8 << 30):
        self.dataset, self.module, self.cut, self.limit_bytes = dataset, module, cut, limit_bytes
        self.rows = _count(dataset)
        self._kept: dict[int, PreparedRow] = {}
        self._buckets: dict[int, tuple[int, ...]] = {}
        self.kept_bytes = 0
        self.dtypes: dict[str, set[np.dtype]] = {}  # slot -> those that were met
        self._as_float: frozenset[str] = frozenset()
        self._is_full = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreparedRow:
        row = index % self.rows
        if row in self._kept:
            return self._kept[row]
        slots, image_size = self._make(row)
        for name, array in slots.items():
            self.dtypes.setdefault(name, set()).add(array.dtype)
        prepared = in_bucket(self._cast(slots), image_size, self.module.pipe)
        self._buckets[row] = prepared.bucket
        size = sum(a.nbytes for a in prepared.slots.values())
        if self.kept_bytes + size <= self.limit_bytes:
            self._kept[row] = prepared
            self.kept_bytes += size
        elif not self._is_full:
            self._is_full = True
            logger.warning("prepared rows fill %.1f GiB: row %d and others beyond that are prepared again at every "
                           "use.", self.limit_bytes / 2**30, row)
        return prepared

    def use_float32(self, names: Collection[str]) -> None:
        """Give these slots of every row as float32: of a template, where a row has 1 and another one 0.5."""
        self._as_float = frozenset(names)
        self._kept = {row: replace(kept, slots=self._cast(kept.slots)) for row, kept in self._kept.items()}

    def _cast(self, slots: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: a.astype(np.float32) if n in self._as_float else a for n, a in slots.items()}

    def bucket_of(self, index: int) -> tuple[int, ...]:
        """The bucket of a row; see `PreparedRow`."""
        row = index % self.rows
        if row not in self._buckets:
            self[row]
        return self._buckets[row]

    def label(self, row: int) -> str:
        """What to call a row in a message."""
        return label_of(self.dataset, row)

    def _make(self, row: int) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        return prepare_row(self.dataset, row, self.module, self.cut)


class CachedRows(PreparedRows):
    """The same, read from a cache instead of prepared; no model of the prepared half is needed.

    Args:
        cache: checked by `storage.cache.Cache.check`. name: ``"instance"`` or ``"class"``.
        repeat: how many times an epoch goes through the rows.
    """

    def __init__(self, cache: Cache, name: str, module: DiffusionTrainingModule, repeat: int = 1,
                 limit_bytes: int = 8 << 30):
        self.cache, self.planned = cache, cache.rows(name)
        super().__init__(range(len(self.planned) * repeat), module, None, limit_bytes)
        self.rows = len(self.planned)

    def label(self, row: int) -> str:
        return self.planned[row].label

    def _make(self, row: int) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        return self.cache.read(self.planned[row].key, self.planned[row].label)


def prepare_all(sets: Sequence[PreparedRows], progress: Progress) -> None:
    """Prepare every row of the data sets, or read it from its cache."""
    what = "reading" if isinstance(sets[0], CachedRows) else "preparing"
    progress.begin(sum(rows.rows for rows in sets), what, "row")
    with counted_cuts() as cuts:
        for rows in sets:
            for row in range(rows.rows):
                still()
                cuts.row = rows.label(row)
                rows[row]
                progress.advance()
        progress.end()
    met = {name: set().union(*(rows.dtypes.get(name, ()) for rows in sets)) for name in sets[0].dtypes}
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
        row = index % _count(source)
        numbers = getattr(getattr(source, "dataset", source), "numbers", None)  # others may be held out
        number = row if numbers is None else numbers[row]
        found.append({"row": number + 1, "name": label_of(source, row), "sample": sample} | kind)
    return found


def name_row(row: dict[str, Any]) -> str:
    """``cat.png (row 3, sample 17)`` for one of `rows_of`."""
    number, kind = f"row {row['row']}", "class image " if "set" in row else ""
    place = "" if row["name"] == number else f"{number}, "
    return f"{kind}{row['name']} ({place}sample {row['sample']})"


def _count(dataset: Any) -> int:
    """Rows, each counted once, however often an epoch shows it."""
    rows = getattr(dataset, "rows", dataset)
    return rows if isinstance(rows, int) else min(len(rows), len(dataset))


def image_size(data: dict[str, Any]) -> tuple[int, ...]:
    """The size of a row's image in pixels: (height, width)."""
    return data["image"].size[1], data["image"].size[0]


def in_bucket(slots: dict[str, np.ndarray], size: tuple[int, ...], pipe: Pipeline) -> PreparedRow:
    """A row as the step takes it: the slots of varying length padded; see `pipeline.pad_prompts`.

    Rows of one size share a batch when further inputs (edit images, a template's values) have the same shapes too.

    Raises: DataError when a row is longer than the longest.
    """
    further = {name for units in pipe.optional_units.values() for unit in units for name in unit.output_params}
    shapes = [side for name in sorted(further & set(slots)) for side in slots[name].shape]
    slots, length = pad_prompts(pipe, slots)
    return PreparedRow(slots, size, (*size, *([] if length is None else [length]), *shapes))
