"""The batches of a run as the step takes them, the next one made while the device is at work on the present one."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ms_diffsynth.data.loader import Batch, Loader


class Batches:
    """``next()`` gives a batch and what the step takes of it; ``ahead()`` makes the one after it already.

    Args:
        loader: its epochs follow each other without end.
        inputs_of: from a batch to the inputs of the step.

    What goes wrong ahead of time is raised by ``next()``, when it is due.
    """

    def __init__(self, loader: Loader, inputs_of: Callable[[Batch], Any]):
        self._made = self._make(loader, inputs_of)
        self._next: tuple[Batch, Any] | Exception | None = None

    def next(self) -> tuple[Batch, Any]:
        """The next batch and its inputs."""
        self.ahead()
        found, self._next = self._next, None
        if isinstance(found, Exception):
            raise found
        return found

    def ahead(self) -> None:
        """Make the next batch, if that is not done."""
        if self._next is None:
            try:
                self._next = next(self._made)
            except Exception as error:  # of any data set: told when the batch is due
                self._next = error

    def close(self) -> None:
        """End the threads that load ahead."""
        self._made.close()

    @staticmethod
    def _make(loader: Loader, inputs_of: Callable[[Batch], Any]) -> Iterator[tuple[Batch, Any]]:
        while True:
            for batch in loader:
                yield batch, inputs_of(batch)
