"""What a training script asks of its launcher: device, rank, mode, and what the other ranks have to say."""
from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore.ops import operations as P

from ms_diffsynth import runtime
from ms_diffsynth.train.signals import StopRequest

_MOST_BYTES = 2048  # of a message


@dataclass(frozen=True)
class DistributedDataParallelKwargs:
    """Accepted where the documents' scripts pass it; parameters without a gradient get zeros here, so it is moot."""

    find_unused_parameters: bool = False


class Accelerator:
    """Device, rank and mode of this process. It stands where scripts use accelerate's class of that name.

    Args:
        gradient_accumulation_steps: batches per optimizer update.
        mode: ``"graph"`` compiles the training step, ``"pynative"`` runs everything eagerly.
        device: ``"CPU"`` or ``"Ascend"``; None takes an Ascend where there is one.
        kwargs_handlers: accepted for the documents' scripts; see `DistributedDataParallelKwargs`.
    """

    def __init__(self, gradient_accumulation_steps: int = 1, mode: str = "graph", device: str | None = None,
                 kwargs_handlers: list[Any] | None = None):
        self._runtime = runtime.configure(mode, device)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.kwargs_handlers = kwargs_handlers or []

    @property
    def device(self) -> str:
        """``"CPU"`` or ``"Ascend"``."""
        return self._runtime.device

    @property
    def mode(self) -> str:
        """``"graph"`` or ``"pynative"``."""
        return self._runtime.mode

    @property
    def process_index(self) -> int:
        """Rank of this process."""
        return self._runtime.rank

    @property
    def num_processes(self) -> int:
        """World size."""
        return self._runtime.world_size

    @property
    def is_main_process(self) -> bool:
        """Whether this process logs and saves."""
        return self._runtime.rank == 0

    def wait_for_everyone(self) -> None:
        """Return when every rank has come here."""
        self.gather_text("")

    def gather_text(self, text: str) -> list[str]:
        """What each rank says here, by rank; at most 2 kB of it. Every rank must call it."""
        if self.num_processes == 1:
            return [text]
        data = text.encode()[:_MOST_BYTES]
        row = np.zeros((1, _MOST_BYTES), np.float32)  # bytes, in the one dtype that every collective has
        row[0, :len(data)] = np.frombuffer(data, np.uint8)
        rows = P.AllGather()(Tensor(row)).asnumpy().astype(np.uint8)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


class Agreement:
    """One decision of all ranks to stop after the same step, whichever of them was asked to.

    Each call takes part in a gathering that the next call reads, so that no step waits for it: of several ranks, all
    stop a step after the signal.
    """

    def __init__(self, stop: StopRequest, accelerator: Accelerator):
        self.stop, self._is_alone = stop, accelerator.num_processes == 1
        self._pending: Tensor | None = None
        self._agreed = False

    def __call__(self, is_last: bool = False) -> bool:
        """Whether to stop now. Every rank must ask after the same steps; then ``stop.signal`` is set on all of them.

        Args:
            is_last: wait for what all ranks say at this moment.
        """
        if self._is_alone:
            return self.stop.signal is not None
        before, self._pending = self._pending, self._gather()
        for numbers in (before, self._pending if is_last else None):
            if numbers is not None and (number := int(numbers.asnumpy().max())):
                self._agreed = True
                self.stop.signal = self.stop.signal or signal.Signals(number)
        return self._agreed

    def _gather(self) -> Tensor:
        return P.AllGather()(Tensor(np.float32([self.stop.signal or 0])))
