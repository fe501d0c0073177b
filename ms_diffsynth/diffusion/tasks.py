"""What a run may minimise, by name. A new task is a class with the members of `Task` and a line in ``TASKS``."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ms_diffsynth.diffusion.distillation import DirectDistillation
from ms_diffsynth.diffusion.units import Objective, Random
from ms_diffsynth.units import PipelineUnit, TensorUnit


class Task(Protocol):
    """A frozen dataclass whose fields are settings of a run.

    Attributes:
        inputs: columns of the data set it reads besides those of the pipeline.
        draws: random slots that are drawn anew at every step.
        posterior: ``"mean"`` or ``"sample"`` of the VAE's posterior.
        prior_loss_weight: weight of the class images; None when there are none.
        level_draw: which of ``draws`` is the noise level, as int32 positions on the training grid; None when none is.
    """

    inputs: tuple[str, ...]
    posterior: str
    prior_loss_weight: float | None
    level_draw: str | None

    @property
    def draws(self) -> tuple[str, ...]: ...

    def draw(self, name: str, shape: tuple[int, ...], grid_size: int, random: Random) -> np.ndarray:
        """The values of one of ``draws`` for a batch of latents of ``shape`` [B, ...] and a grid of ``grid_size``."""

    def units(self, pipe: Any, sigmas: np.ndarray) -> list[PipelineUnit | TensorUnit]:
        """From ``input_latents`` and the draws to ``loss`` and ``sample_losses``, around ``pipe.denoise``."""


@dataclass(frozen=True)
class TaskKind:
    """A task's class, and what its fields are when a run leaves them open."""

    task: type[Task]
    defaults: Mapping[str, Any] = field(default_factory=dict)


# sft is DiffSynth-Studio's supervised script, dreambooth that of document 003; a family may have a class of its own
TASKS = {
    "sft": TaskKind(Objective, {"weighting_scheme": "diffsynth", "posterior": "mean", "guidance_scale": 1.0}),
    "dreambooth": TaskKind(Objective, {"weighting_scheme": "none", "posterior": "sample", "guidance_scale": 3.5}),
    "direct_distill": TaskKind(DirectDistillation, {"guidance_scale": 1.0}),
}
