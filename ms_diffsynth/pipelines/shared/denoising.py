"""What families share that are trained by denoising diffusion instead of flow matching."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ms_diffsynth.diffusion.ddpm import DDPMObjective, NoiseSchedule, Predict, ddim, ddpm
from ms_diffsynth.diffusion.samplers import SAMPLERS
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.models import SCHEDULER_FILE
from ms_diffsynth.pipelines.shared.scheduler import Scheduler

logger = logging.getLogger(__name__)


class DenoisingDiffusion:
    """Mixed into a pipeline, before its base class. ``denoise`` reads ``timestep_index`` and writes ``prediction``.

    Attributes:
        published: the noise schedule of a model without scheduler_config.json.
    """

    objective_class: type[DDPMObjective] = DDPMObjective
    sampled_draws = ("latents", "timestep_index")
    published = NoiseSchedule()
    _schedule: NoiseSchedule | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.objective = self.objective_class()

    def published_scheduler(self) -> NoiseSchedule:
        """As `ImagePipeline.published_scheduler`."""
        return self.published

    def training_schedule(self, objective: str) -> NoiseSchedule:
        """Its sigmas are the grid; ``objective`` changes nothing."""
        return self.noise_schedule

    def objective_for(self, objective: DDPMObjective | Objective | None, task: str = "sft") -> DDPMObjective:
        """As `Pipeline.objective_for`. Raises: ConfigError for an objective of flow matching."""
        if objective is None:
            return self.objective_class()
        if not isinstance(objective, self.objective_class):
            raise ConfigError(f"{objective} is an objective of flow matching, but {type(self).__name__} is trained by "
                              f"denoising diffusion: expected a {self.objective_class.__name__}, or None. Leave out "
                              "weighting_scheme and the settings that belong to it.")
        return objective

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How noise is added and taken away, and what the network predicts: the objective decides that."""
        return self.schedule_for(self.objective)

    def schedule_for(self, objective: DDPMObjective) -> NoiseSchedule:
        """The noise schedule, with what ``objective`` lets the network predict."""
        if self._schedule is None:
            config = self.scheduler_config()
            self._schedule = self.published if config is None else NoiseSchedule.from_config(config)
            if config is None and self.network in self.sources:
                folder = self.sources[self.network].folder
                logger.warning("no %s in %s or %s: the family's own schedule is taken (%d timesteps, %s betas, %s). "
                               "Give a ModelConfig of the file where the network had another.", SCHEDULER_FILE,
                               folder.parent / "scheduler", folder, self.published.num_train_timesteps,
                               self.published.beta_schedule, self.published.prediction_type)
        changes = {"prediction_type": getattr(objective, "prediction_type", None),
                   "rescale_betas_zero_snr": getattr(objective, "zero_terminal_snr", False) or None}
        return replace(self._schedule, **{name: value for name, value in changes.items() if value is not None})


class DiffusionScheduler(Scheduler):
    """The noise levels of denoising diffusion as units ask for them: sigma of sqrt(1 - sigma^2) x + sigma n where the
    pipeline is trained, s of x + s n where it is sampled."""

    def _mixed(self, clean: Tensor, noise: Tensor, sigma: np.ndarray) -> Tensor:
        signal = np.ones_like(sigma) if self._pipe.sampled_sigmas is not None else np.sqrt(1 - sigma**2)
        signal, sigma = (Tensor(x).reshape((-1, *[1] * (clean.ndim - 1))) for x in (signal, sigma))
        return signal * clean + sigma * noise

    def _timesteps(self) -> np.ndarray:
        if self._pipe.sampled_sigmas is None:
            return np.arange(len(self._levels()), dtype=np.float32)
        return np.array([self._pipe.noise_schedule.timestep_at(float(s)) for s in self._levels()], np.float32)


def integrate(schedule: NoiseSchedule, predict: Predict, latents: Tensor, sigmas: np.ndarray, sampler: str = "euler",
              noise: Callable[[int], np.ndarray] | None = None,
              on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """From latents x + s n at ``sigmas[0]`` to x.

    Shapes: latents float32 [B, ...]; sigmas float32 [n + 1] of `NoiseSchedule.sampling_sigmas`, the last so many of
    them -> float32 [B, ...].

    Args:
        sampler: of `diffusion.samplers.SAMPLERS`, or ``ddim`` or ``ddpm``, which walk the timesteps of the sigmas.
        noise: what step k of ddpm adds.
    """
    first, steps = float(sigmas[0]), len(sigmas) - 1
    if sampler not in ("ddim", "ddpm"):
        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            s = float(sigma.asnumpy()[0])
            index = np.full(latents.shape[0], schedule.timestep_at(s), np.float32)
            prediction = predict(latents / math.sqrt(s**2 + 1), Tensor(index)).astype(ms.float32)
            return schedule.velocity(prediction, latents, s)

        return SAMPLERS[sampler](velocity, latents, sigmas, on_step)
    # sigmas may be the last of more; those of another number of steps that end alike have the same timesteps
    n = next(n for n in range(steps, schedule.num_train_timesteps + 1)
             if np.array_equal(schedule.sampling_sigmas(n)[-steps - 1:], sigmas))
    latents = latents / math.sqrt(first**2 + 1)
    if sampler == "ddim":
        return ddim(predict, latents, schedule, n, on_step=on_step, last=steps)
    return ddpm(predict, latents, schedule, n, lambda k: Tensor(noise(k)), on_step, steps)
