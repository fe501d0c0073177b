"""What a training script asks of its launcher: device, rank, mode, and what the other ranks have to say."""
from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore.ops import operations as P

from ms_diffsynth import runtime
from ms_diffsynth.training.signals import StopRequest

_MOST_BYTES = 2048  # of a message


@dataclass(frozen=True)
class DistributedDataParallelKwargs:
    """Accepted where the documents' scripts pass it; parameters without a gradient get zeros here, so it is moot."""

    find_unused_parameters: bool = False


class Accelerator:
    """Device, rank and mode of this process. It stands where scripts use accelerate's class of that name.

    Args:
        gradient_accumulation_steps: batches per optimizer update.
        mode: ``"graph"`` compiles the training step, ``"pynative"`` runs everything eagerly; None is what the script
            chose by ``mindspore.set_context``, else ``"graph"``.
        device: ``"CPU"`` or ``"Ascend"``; None takes an Ascend where there is one.
        kwargs_handlers: accepted for the documents' scripts; see `DistributedDataParallelKwargs`.
        jit_level, device_memory: of an Ascend; see `runtime.configure`.
    """

    def __init__(self, gradient_accumulation_steps: int = 1, mode: str | None = None, device: str | None = None,
                 kwargs_handlers: list[Any] | None = None, *, jit_level: str | None = None,
                 device_memory: float | None = None):
        self._runtime = runtime.configure(mode, device, jit_level=jit_level, device_memory=device_memory)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.kwargs_handlers = kwargs_handlers or []

    @classmethod
    def of(cls, settings: Mapping[str, Any], **options: Any) -> Accelerator:
        """That of a run with these settings: name -> value."""
        names = ("gradient_accumulation_steps", "mode", "device", "jit_level", "device_memory")
        return cls(**{name: settings[name] for name in names}, **options)

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
    """One decision of all ranks to stop, between two steps, whichever of them was asked to, or cannot go on.

    Attributes:
        is_failed: whether a rank could not go on.
    """

    def __init__(self, stop: StopRequest, accelerator: Accelerator):
        self.stop, self.is_failed, self._is_alone = stop, False, accelerator.num_processes == 1

    def __call__(self, is_failed: bool = False) -> bool:
        """Whether to stop now. Every rank must ask after the same steps; ``stop.signal`` and ``is_failed`` are then the
        same on all of them.
        """
        if self._is_alone:
            self.is_failed = is_failed
        else:
            said = np.float32([[float(is_failed), self.stop.signal or 0]])
            failed, number = P.AllGather()(Tensor(said)).asnumpy().max(axis=0)
            self.is_failed = bool(failed)
            if number:
                self.stop.signal = self.stop.signal or signal.Signals(int(number))
        return self.is_failed or self.stop.signal is not None
