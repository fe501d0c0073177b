"""What a run may minimise. A new task is a class with the members of `Task` and a line in `registry.TASKS`."""
from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ms_diffsynth.diffusion.units import Random
from ms_diffsynth.registry import TASKS, entry
from ms_diffsynth.units import PipelineUnit, TensorUnit


class Task(Protocol):
    """A frozen dataclass whose fields are settings of a run.

    Attributes:
        inputs: columns of the data set it reads besides those of the pipeline.
        draws: random slots that are drawn anew at every step.
        posterior: ``"mean"`` or ``"sample"`` of the VAE's posterior.
        prior_loss_weight: weight of the class images; None when there are none.
        level_draw: which of ``draws`` is the noise level, as int32 positions on the training grid; None when none is.
        metrics: further slots float32 [B] that its units write, which the validation tells beside the loss.
        saved_models: models whose folder, as diffusers loads it, is written at every save.
    """

    inputs: tuple[str, ...]
    posterior: str
    prior_loss_weight: float | None
    level_draw: str | None
    metrics: tuple[str, ...] = ()
    saved_models: tuple[str, ...] = ()

    @property
    def draws(self) -> tuple[str, ...]: ...

    def draw(self, name: str, shape: tuple[int, ...], grid_size: int, random: Random) -> np.ndarray:
        """The values of one of ``draws`` for a batch of latents of ``shape`` [B, ...] and a grid of ``grid_size``."""

    def validated(self) -> Task:
        """The task as held-out images are looked at: the same without what belongs to training alone."""
        return self

    def units(self, pipe: Any, sigmas: np.ndarray) -> list[PipelineUnit | TensorUnit]:
        """From ``input_latents`` and the draws to ``loss`` and ``sample_losses``, around ``pipe.denoise``."""


def task_class(name: str) -> type[Task]:
    """The class of the task called ``name`` in `registry.TASKS`."""
    return entry(TASKS[name].where)


def task(name: str) -> Task:
    """The task called ``name``, as it is when a run leaves its fields open."""
    return task_class(name)(**TASKS[name].defaults)
