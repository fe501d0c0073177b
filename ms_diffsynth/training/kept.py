"""Prepared slots that are kept: in memory while they fit, then in files that are removed when the run ends."""
from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ms_diffsynth.errors import CacheError, OutputError
from ms_diffsynth.storage.cache import Cache, Entry, digest_of

logger = logging.getLogger(__name__)

SPARE_BYTES = 2 << 30  # of a disk are left free for what the run saves


class Kept:
    """Entries by key.

    Args:
        limit_bytes: what fits into memory.

    Attributes:
        bytes: in memory.
        folder: of the files beyond that; None: what does not fit is not kept.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.bytes = limit_bytes, 0
        self.folder: Path | None = None
        self._in_memory: dict[str, Entry] = {}
        self._files: Cache | None = None
        self._in_files: set[str] = set()
        self._is_full = False

    def get(self, key: str) -> Entry | None:
        """An entry; None when it is not kept, or its file was damaged."""
        if key not in self._in_files:
            return self._in_memory.get(key)
        try:
            return self._files.entry(digest_of(key))
        except CacheError as error:
            logger.warning("%s", error)
            self._in_files.discard(key)
            return None

    def put(self, key: str, slots: dict[str, np.ndarray], size: Sequence[int] = (), text: str = "") -> None:
        """Keep an entry, if there is room."""
        if key in self._in_memory or key in self._in_files:
            return
        needed = sum(array.nbytes for array in slots.values())
        if self.bytes + needed <= self.limit_bytes:
            self._in_memory[key] = Entry(slots, tuple(size), text)
            self.bytes += needed
        elif self.folder is not None and not self._is_full:
            self._write(key, slots, size, text, needed)
        elif not self._is_full:
            self._tell_full("")

    def close(self) -> None:
        """Remove the files."""
        if self._files is not None:
            shutil.rmtree(self._files.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other ranks or data sets have files there
                self._files.folder.parent.rmdir()
            self._files, self._in_files = None, set()

    def _write(self, key: str, slots: dict[str, np.ndarray], size: Sequence[int], text: str, needed: int) -> None:
        if self._files is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            logger.warning("prepared rows fill %.1f GiB of memory: others are written to %s and removed when the run "
                           "ends; %.1f GiB are free there. With cache_dir they are kept.", self.limit_bytes / 2**30,
                           self.folder, shutil.disk_usage(self.folder).free / 2**30)
            self._files = Cache(self.folder)
        if shutil.disk_usage(self.folder).free - needed < SPARE_BYTES:
            self._tell_full(f", and {self.folder} has less than {SPARE_BYTES / 2**30:g} GiB free")
            return
        try:
            self._files.write(digest_of(key), slots, size, text)
        except OutputError as error:
            self._tell_full(f", and not on the disk: {error}")
            return
        self._in_files.add(key)

    def _tell_full(self, why: str) -> None:
        self._is_full = True
        logger.warning("prepared rows beyond %.1f GiB are not kept%s: they are prepared again at every use. Set "
                       "cache_dir to a folder with more room.", self.limit_bytes / 2**30, why)
