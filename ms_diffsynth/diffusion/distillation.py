"""Direct distillation: in a few steps the student goes from the teacher's noise to the teacher's sample.

A row of the data set is a sample of the teacher (``image``), its prompt, and the ``seed`` it was made from, which gives
the noise. All steps of the student lie in the compiled step, and the gradient passes through them.

Source: DiffSynth-Studio 2.1, DirectDistillLoss.
"""
from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from ms_diffsynth.diffusion import losses
from ms_diffsynth.diffusion.units import EmbeddedGuidance, Random
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import DataError, ProgramError
from ms_diffsynth.program import slot
from ms_diffsynth.units import PipelineUnit, TensorUnit


@dataclass(frozen=True, kw_only=True)
class DirectDistillation:
    """What direct distillation minimises: the mean squared difference of the student's sample and the teacher's.

    Attributes:
        distill_steps: sampling steps of the student, which samples at the same noise levels afterwards.
        guidance_scale: the scale embedded in a guidance-distilled network while it is trained.
    """

    distill_steps: int = 4
    guidance_scale: float = 1.0

    inputs = ("seed",)
    draws = ()
    posterior = "mean"
    prior_loss_weight = None
    level_draw = None
    metrics = saved_models = ()

    def __str__(self) -> str:
        """The line that a run logs about it at its start."""
        return f"direct distillation to {self.distill_steps} steps"

    def draw(self, name: str, shape: tuple[int, ...], grid_size: int, random: Random) -> np.ndarray:
        raise ProgramError(f"direct distillation draws nothing at a step: '{name}' is unknown.")

    def validated(self) -> DirectDistillation:
        return self

    def units(self, pipe, sigmas: np.ndarray) -> list[PipelineUnit | TensorUnit]:
        return [ReplayNoise(self.distill_steps), EmbeddedGuidance(self.guidance_scale),
                Unroll(pipe.denoise, self.distill_steps), DistillationLoss()]


class ReplayNoise(PipelineUnit):
    """The noise that a sample was made from, as `ImagePipeline.__call__` draws it, and the student's noise levels.

    Shapes: seed int, height, width pixels, num_frames of a video -> noise float32 [1, ...] of the latents' shape,
    sigmas float32 [1, n + 1], sigma float32 [1], the first of them.
    """

    input_params = ("seed", "height", "width", "num_frames?")
    output_params = ("noise", "sigmas", "sigma")

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def process(self, pipe, seed, height, width, num_frames=None):
        try:
            number = int(seed)
        except (TypeError, ValueError):
            number = -1
        if number < 0:
            raise DataError(f"seed={seed!r}: expected the whole number, at least 0, that the image was sampled from.")
        shape = pipe.latent_shape(*([] if num_frames is None else [num_frames]), height, width)
        sigmas = pipe.sampling_sigmas(self.steps, shape).astype(np.float32)
        return {"noise": Tensor(Draws(number).normal("latents", np.array([0]), shape)),
                "sigmas": Tensor(sigmas[None]), "sigma": Tensor(sigmas[:1])}


class Unroll(TensorUnit):
    """All sampling steps of the student, by Euler's method, with the unit that calls the network.

    Shapes: noise float32 [B, ...], sigmas float32 [B, n + 1], and what the network reads besides -> sample [B, ...].
    """

    output_params = ("sample",)

    def __init__(self, denoise: TensorUnit, steps: int):
        super().__init__()
        self.denoise, self.steps = denoise, steps
        self.onload_model_names = denoise.onload_model_names
        conditions = [p for p in denoise.input_params if slot(p) not in ("latents", "sigma")]
        self.input_params = ("noise", "sigmas", *conditions)
        taken = ["latents", "sigma", *map(slot, conditions)]
        self.places = tuple(taken.index(slot(p)) for p in denoise.input_params)

    def attach(self, pipe):
        self.denoise.attach(pipe)

    def detach(self, model_names):
        self.denoise.detach(model_names)

    def construct(self, noise, sigmas, *conditions):
        latents = noise
        for i in range(self.steps):
            known = (latents, sigmas[:, i]) + conditions
            velocity = self.denoise(*[known[k] for k in self.places])[0].astype(ms.float32)
            change = (sigmas[:, i + 1] - sigmas[:, i]).reshape((-1,) + (1,) * (latents.ndim - 1))
            latents = latents + velocity * change
        return (latents,)


class DistillationLoss(TensorUnit):
    """Mean squared difference of the student's sample and the teacher's.

    Shapes: sample, input_latents float32 [B, ...] -> loss float32 scalar, sample_losses float32 [B].
    """

    input_params = ("sample", "input_latents")
    output_params = ("loss", "sample_losses")

    def construct(self, sample, input_latents):
        return losses.weighted_mse(sample, input_latents, mint.ones((sample.shape[0],)))
