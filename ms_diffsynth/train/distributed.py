"""What a training script asks of its launcher: device, rank, mode."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ms_diffsynth import runtime


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
