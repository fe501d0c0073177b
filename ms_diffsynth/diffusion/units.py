"""Flow matching as units: where sigma comes from, the path, and the loss.

What is random (``noise``, ``timestep_index``, ``posterior_noise``) enters from the host; everything else is computed
from it inside the compiled step.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from ms_diffsynth.diffusion import density, flow, losses, weighting
from ms_diffsynth.ops.clamp import clamp
from ms_diffsynth.units import PipelineUnit, TensorUnit

Random = Callable[[str, str, tuple[int, ...]], np.ndarray]  # (stream, "normal" or "uniform", shape) -> float32


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What flow-matching training minimises.

    Attributes:
        weighting_scheme: one of `diffusion.weighting.SCHEMES`: which sigmas are drawn and how they are weighted.
        density: draw sigmas by this scheme instead; None follows ``weighting_scheme``.
        logit_mean, logit_std, mode_scale: shape of the densities ``logit_normal`` and ``mode``.
        posterior: ``"mean"`` or ``"sample"`` of the VAE's posterior.
        guidance_scale: the scale embedded in a guidance-distilled network while it is trained.
        prior_loss_weight: weight of the class images; None when there are none.
        index_range: sigmas are drawn from these positions of the grid alone, the first included, the last not; their
            weights stay those of the whole grid. None draws from all.
    """

    weighting_scheme: str = "none"
    density: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    posterior: str = "mean"
    guidance_scale: float = 1.0
    prior_loss_weight: float | None = None
    index_range: tuple[int, int] | None = None

    inputs = ()
    level_draw = "timestep_index"
    metrics = saved_models = ()

    def __str__(self) -> str:
        """The line that a run logs about it at its start."""
        part = "" if self.index_range is None else f" at positions {self.index_range[0]} to {self.index_range[1] - 1}"
        prior = "" if self.prior_loss_weight is None else f", class images weigh {self.prior_loss_weight:g}"
        return (f"noise levels by {self.density or self.weighting_scheme}{part}, loss weights by "
                f"{self.weighting_scheme}, {self.posterior} of the VAE's posterior{prior}")

    @property
    def draws(self) -> tuple[str, ...]:
        """The random slots this objective reads."""
        return ("noise", "timestep_index") + (("posterior_noise",) if self.posterior == "sample" else ())

    def draw(self, name: str, shape: tuple[int, ...], grid_size: int, random: Random) -> np.ndarray:
        """The values of one of ``draws`` for a batch of latents of ``shape`` [B, ...] and a grid of ``grid_size``."""
        if name != "timestep_index":
            return random(name, "normal", shape)
        raw = random("density_draw", density.draw_kind(self.density or self.weighting_scheme), shape[:1])
        return self.timestep_index(raw, grid_size)

    def timestep_index(self, density_draw: np.ndarray, grid_size: int) -> np.ndarray:
        """Positions on the training grid, int32 [B], from raw draws float32 [B] of `density.draw_kind`."""
        u = density.density(density_draw, self.density or self.weighting_scheme, self.logit_mean, self.logit_std,
                            self.mode_scale)
        first, end = self.index_range or (0, grid_size)
        return density.timestep_index(u, end - first) + np.int32(first)

    def validated(self) -> Objective:
        """Without class images."""
        return replace(self, prior_loss_weight=None)

    def units(self, pipe, sigmas: np.ndarray) -> list[TensorUnit]:
        """As `diffusion.tasks.Task.units`."""
        return flow_match_units(self, sigmas, pipe.denoise)


class LookupSigma(TensorUnit):
    """Noise level and loss weight by index, both in float32: a timestep is never searched for in the grid again.

    Shapes: timestep_index int32 [B] -> sigma float32 [B], loss_weight float32 [B].
    """

    input_params = ("timestep_index",)
    output_params = ("sigma", "loss_weight")

    def __init__(self, sigmas: np.ndarray, scheme: str):
        super().__init__()
        self.sigmas = Tensor(sigmas, ms.float32)
        self.weights = Tensor(weighting.table(scheme, sigmas), ms.float32)

    def construct(self, timestep_index):
        return mint.index_select(self.sigmas, 0, timestep_index), mint.index_select(self.weights, 0, timestep_index)


class SampleLatents(TensorUnit):
    """Latents from the VAE's posterior: its mean, or mean + std * posterior_noise; then shifted and scaled.

    Shapes: moments float32 [B, 2C, ...] (mean, log-variance) -> input_latents float32 [B, C, ...].
    Shift and scale are those of the pipeline's VAE; its weights are not touched.
    """

    input_params = ("moments",)
    output_params = ("input_latents",)
    is_always_fused = True  # so that the moments are cached, not a sample

    def __init__(self, posterior: str, scaling_factor: float = 1.0, shift_factor: float = 0.0):
        super().__init__()
        self.is_sampled = posterior == "sample"
        if self.is_sampled:
            self.input_params = ("moments", "posterior_noise")
        self.scaling_factor, self.shift_factor, self.is_by_channel = scaling_factor, shift_factor, False

    def attach(self, pipe):
        config = pipe.config("vae")
        if config.get("latents_mean") is not None:  # a shift and a scale for each channel
            mean, std = (np.array(config[name], np.float32) for name in ("latents_mean", "latents_std"))
            self.scaling_factor, self.shift_factor, self.is_by_channel = Tensor(1 / std), Tensor(mean), True
        else:
            self.scaling_factor, self.shift_factor = config["scaling_factor"], config.get("shift_factor") or 0.0

    def construct(self, moments, posterior_noise=None):
        latents, log_variance = mint.split(moments, moments.shape[1] // 2, 1)
        if self.is_sampled:
            # exp(x / 2) as a power: the CPU's exp is good to 5e-6 only, its pow to 1e-7
            log_variance = clamp(log_variance, -30.0, 20.0)
            latents = latents + ops.pow(Tensor(np.float32(np.exp(0.5))), log_variance) * posterior_noise
        shift, scale = self.shift_factor, self.scaling_factor
        if self.is_by_channel:
            axes = (1, -1, *(1,) * (latents.ndim - 2))
            shift, scale = shift.reshape(axes), scale.reshape(axes)
        return ((latents - shift) * scale,)


class StartLatents(PipelineUnit):
    """Where sampling starts from an image: its latents with the noise of the first level that is sampled.

    Shapes: input_latents, start_noise float32 [B, ...] -> start_latents of the same shape.
    """

    input_params = ("input_latents", "start_noise")
    output_params = ("start_latents",)

    def process(self, pipe, input_latents, start_noise):
        scheduler = pipe.scheduler
        return {"start_latents": scheduler.add_noise(input_latents, start_noise, scheduler.timesteps[0])}


class FlowMatchPath(TensorUnit):
    """The point on the straight path from data to noise, and the velocity there.

    Shapes: input_latents, noise float32 [B, ...], sigma float32 [B] -> latents, target of the same shape. Of a film's
    latents [B, C, F, h, w] the first frames may be given: given_latents float32 [B, C, k, h, w] stand there, clean.
    """

    input_params = ("input_latents", "noise", "sigma", "given_latents?")
    output_params = ("latents", "target")

    def construct(self, input_latents, noise, sigma, given_latents=None):
        latents = flow.interpolate(input_latents, noise, sigma)
        if given_latents is not None:
            latents = flow.with_given(latents, given_latents)
        return latents, flow.velocity_target(input_latents, noise)


class EmbeddedGuidance(TensorUnit):
    """The guidance scale given to a distilled network, the same for every sample.

    Shapes: sigma float32 [B] -> guidance float32 [B].
    """

    input_params = ("sigma",)
    output_params = ("guidance",)

    def __init__(self, guidance_scale: float):
        super().__init__()
        self.guidance_scale = guidance_scale

    def construct(self, sigma):
        return (ops.full_like(sigma, self.guidance_scale),)


class FlowMatchLoss(TensorUnit):
    """Weighted mean squared error of the velocity, with or without prior preservation.

    Shapes: velocity, target float [B, ...], loss_weight float32 [B] -> loss float32 scalar, sample_losses float32 [B].
    With ``prior_loss_weight`` the first half of the batch holds instances, the second half class images. The frames of
    given_latents [B, C, k, h, w] are not part of it.
    """

    input_params = ("velocity", "target", "loss_weight", "given_latents?")
    output_params = ("loss", "sample_losses")

    def __init__(self, prior_loss_weight: float | None = None):
        super().__init__()
        self.prior_loss_weight = prior_loss_weight

    def construct(self, velocity, target, loss_weight, given_latents=None):
        velocity, target = self.free(velocity, target, given_latents)
        loss, sample_losses = losses.weighted_mse(velocity, target, loss_weight)
        if self.prior_loss_weight is not None:
            loss = losses.prior_preservation(sample_losses, self.prior_loss_weight)
        return loss, sample_losses

    def free(self, velocity, target, given_latents):
        """Both, without the frames that are given."""
        if given_latents is None:
            return velocity, target
        count = given_latents.shape[2]
        return flow.behind(velocity, count), flow.behind(target, count)


def flow_match_units(objective: Objective, sigmas: np.ndarray, denoise: TensorUnit) -> list[TensorUnit]:
    """From ``input_latents`` and the draws to ``loss``, with the family's ``denoise`` in the middle."""
    return [
        LookupSigma(sigmas, objective.weighting_scheme),
        FlowMatchPath(),
        EmbeddedGuidance(objective.guidance_scale),
        denoise,
        FlowMatchLoss(objective.prior_loss_weight),
    ]
