"""Prompts that are longer than what a text encoder reads: said one by one, or in one line for many rows."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ms_diffsynth.errors import listing

logger = logging.getLogger(__name__)


class Cuts:
    """Prompts that were cut, by what they were cut to. ``row`` is what to call the one that is being prepared."""

    def __init__(self):
        self.row, self.found = "", {}

    @contextlib.contextmanager
    def of(self, row: str) -> Iterator[None]:
        """Count the prompts that are cut inside the block, where the row is prepared that is called this."""
        global _counting
        self.row, before = row, _counting
        _counting = self
        try:
            yield
        finally:
            _counting = before

    def tell(self) -> None:
        """Say, once, how many prompts were cut, and which."""
        found, self.found = self.found, {}
        for kind, rows in found.items():
            logger.warning("%d prompts are longer than %s, and cut there: %s.", len(rows), kind, listing(rows, 3))


_counting: Cuts | None = None


def tell_cut(tokens: int, kind: str, length: int, prompt: str) -> None:
    """Say, or count, that a prompt of ``tokens`` tokens was cut to ``length``. ``kind``: such as "CLIP tokens"."""
    if _counting is None:
        logger.warning("prompt of %d %s is cut to %d: %r", tokens, kind, length, prompt[:80])
    else:
        _counting.found.setdefault(f"{length} {kind}", []).append(_counting.row)
