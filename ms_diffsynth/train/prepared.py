"""The prepared half of every row, computed once and kept: exactly the slots that cross the cut."""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_diffsynth.program import Cut
from ms_diffsynth.train.module import DiffusionTrainingModule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRow:
    """What the step needs of one row."""

    slots: dict[str, np.ndarray]  # without batch axis
    size: tuple[int, int]  # height, width of the picture, pixels


class PreparedRows:
    """A data set whose items are prepared rows.

    Args:
        dataset: rows of pictures and captions; item ``i`` and item ``i + rows`` are the same row.
        module, cut: what prepares, and for which job.
        limit_bytes: rows beyond this much memory are prepared again at every use.
    """

    def __init__(self, dataset: Any, module: DiffusionTrainingModule, cut: Cut, limit_bytes: int = 8 << 30):
        self.dataset, self.module, self.cut, self.limit_bytes = dataset, module, cut, limit_bytes
        self.rows = min(len(getattr(dataset, "rows", dataset)), len(dataset))
        self._kept: dict[int, PreparedRow] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self.kept_bytes = 0
        self._is_full = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreparedRow:
        row = index % self.rows
        if row in self._kept:
            return self._kept[row]
        data = self.dataset[row]
        prepared = PreparedRow(self.module.prepare(data, self.cut), (data["image"].size[1], data["image"].size[0]))
        self._sizes[row] = prepared.size
        size = sum(a.nbytes for a in prepared.slots.values())
        if self.kept_bytes + size <= self.limit_bytes:
            self._kept[row] = prepared
            self.kept_bytes += size
        elif not self._is_full:
            self._is_full = True
            logger.warning("prepared rows fill %.1f GiB: row %d and others beyond that are prepared again at every "
                           "use, which runs the encoders in each step.", self.limit_bytes / 2**30, row)
        return prepared

    def prepare_all(self, on_row: Callable[[], None]) -> None:
        """Prepare every row, calling ``on_row`` after each."""
        for row in range(self.rows):
            self[row]
            on_row()

    def bucket_of(self, index: int) -> tuple[int, int]:
        """Height and width of a row's picture: rows of one bucket may share a batch."""
        row = index % self.rows
        if row not in self._sizes:
            self[row]
        return self._sizes[row]
