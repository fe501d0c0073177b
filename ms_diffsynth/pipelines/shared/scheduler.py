"""The noise levels of a pipeline as DiffSynth-Studio's units ask for them: ``pipe.scheduler``."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor

from ms_diffsynth.diffusion import flow
from ms_diffsynth.diffusion.schedule import last_steps
from ms_diffsynth.errors import ProgramError

if TYPE_CHECKING:
    from ms_diffsynth.pipelines.shared.image import ImagePipeline


class Scheduler:
    """A view: all that it says is in the pipeline, in ``sigmas`` (trained on) and ``sampled_sigmas``.

    Source: DiffSynth-Studio 2.1.12, FlowMatchScheduler; the levels are those of `diffusion.schedule`.
    """

    def __init__(self, pipe: ImagePipeline):
        self._pipe = pipe

    @property
    def training(self) -> bool:
        """Whether units run for training, and not for sampling, also that of a pipeline that is being trained."""
        return self._pipe.sigmas is not None and self._pipe.sampled_sigmas is None

    @property
    def sigmas(self) -> Tensor:
        """Noise levels, float32 [n], falling: those that are trained on, or those of the sampling steps, without the 0
        at their end.

        Raises: ProgramError before there are any.
        """
        return Tensor(self._levels())

    @property
    def timesteps(self) -> Tensor:
        """1000 times ``sigmas``."""
        return Tensor(self._timesteps())

    def set_timesteps(self, num_inference_steps: int = 100, denoising_strength: float = 1.0, training: bool = False,
                      dynamic_shift_len: int | None = None) -> None:
        """Choose the levels: of sampling steps, or with ``training`` those that are trained on.

        Args:
            denoising_strength: only this part of the steps, the last ones; see `schedule.last_steps`.
            dynamic_shift_len: image tokens, by which some schedules shift; None is the family's default size.

        Raises: ConfigError for fewer than one step, or a strength outside (0, 1].
        """
        pipe = self._pipe
        if training:
            pipe.sampled_sigmas = None
            pipe.sigmas = pipe.training_schedule("sft").sigmas if pipe.sigmas is None else pipe.sigmas
            return
        patch = pipe.latent_patch
        shape = (pipe.latent_shape(*pipe.usual_size) if dynamic_shift_len is None
                 else (1, patch, patch * dynamic_shift_len))
        pipe.sampled_sigmas = last_steps(pipe.sampling_sigmas(num_inference_steps, shape), denoising_strength)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """The point at ``timestep`` on the path from data to noise, (1 - s) x + s n; s is that of the nearest timestep.

        Shapes: original_samples, noise float [B, ...], timestep a number or [B] -> float32 [B, ...].
        """
        given = np.atleast_1d(timestep.asnumpy() if isinstance(timestep, Tensor) else np.asarray(timestep))
        nearest = np.abs(self._timesteps()[None] - given.astype(np.float32)[:, None]).argmin(1)
        sigma = np.broadcast_to(self._levels()[nearest], original_samples.shape[:1])
        return self._mixed(original_samples, noise, np.ascontiguousarray(sigma, np.float32))

    def _mixed(self, clean: Tensor, noise: Tensor, sigma: np.ndarray) -> Tensor:
        """Latents at noise levels float32 [B]."""
        return flow.interpolate(clean, noise, Tensor(sigma))

    def _levels(self) -> np.ndarray:
        sampled, trained = self._pipe.sampled_sigmas, self._pipe.sigmas
        if sampled is None and trained is None:
            raise ProgramError("the scheduler has no noise levels yet: expected a call of the pipeline, or "
                               "scheduler.set_timesteps(num_inference_steps), before.")
        return trained if sampled is None else sampled[:-1]

    def _timesteps(self) -> np.ndarray:
        return np.float32(1000) * self._levels()
