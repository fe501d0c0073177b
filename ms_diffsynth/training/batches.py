"""The batches of a run as the step takes them, the next one made while the device is at work on the present one."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ms_diffsynth.data.loader import Batch, Loader


class Batches:
    """``next()`` gives a batch and what the step takes of it; ``ahead()`` makes the one after it already.

    Args:
        loader: its epochs follow each other without end.
        inputs_of: from a batch to the inputs of the step.

    Attributes:
        failure: why the batches after those that are loaded cannot be made, which ``next()`` raises when it is due.
    """

    def __init__(self, loader: Loader, inputs_of: Callable[[Batch], Any]):
        self._loaded, self.inputs_of = self._load(loader), inputs_of
        self._waiting: deque[Batch] = deque()
        self._inputs: Any = None  # of the first that is waiting
        self.failure: Exception | None = None

    def load(self, count: int) -> None:
        """Load the next ``count`` batches, so that a step of so many ends."""
        while len(self._waiting) < count and self.failure is None:
            try:
                self._waiting.append(next(self._loaded))
            except Exception as error:  # of any data set: told when the batch is due
                self.failure = error

    def next(self) -> tuple[Batch, Any]:
        """The next batch and its inputs."""
        self.ahead()
        if not self._waiting:
            raise self.failure
        inputs, self._inputs = self._inputs, None
        return self._waiting.popleft(), inputs

    def ahead(self) -> None:
        """Make the inputs of the next batch, if that is not done."""
        self.load(1)
        if self._inputs is None and self._waiting:
            try:
                self._inputs = self.inputs_of(self._waiting[0])
            except Exception as error:
                self.failure = error
                self._waiting.clear()

    def close(self) -> None:
        """End the threads that load ahead."""
        self._loaded.close()

    @staticmethod
    def _load(loader: Loader) -> Iterator[Batch]:
        while True:
            yield from loader
