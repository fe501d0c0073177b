"""Denoising diffusion (DDPM): the forward process, what a network may predict of it, the loss, and two samplers.

    alphas_cumprod    a_t, the share of the image's variance that is left at timestep t; falls from t = 0 on
    signal_scale      sqrt(a_t)
    sigma             sqrt(1 - a_t); **t = 999 is nearly pure noise**
    latents           sqrt(a_t) x + sqrt(1 - a_t) n, of the clean image x and the noise n
    prediction        what the network gives: n (epsilon), x (sample) or sqrt(a_t) n - sqrt(1 - a_t) x (v_prediction)

Latents divided by sqrt(a_t) are x + s n with s = sqrt((1 - a_t) / a_t): in these `NoiseSchedule.velocity` is a velocity
that the samplers of `diffusion.samplers` integrate from the largest s to 0.

Source: Ho et al. 2020 (2006.11239), Song et al. 2021 (2010.02502), Salimans and Ho 2022 (2202.00512, v). Numbers are
those of diffusers 0.39, DDPMScheduler, DDIMScheduler and EulerDiscreteScheduler, whose settings a `NoiseSchedule` has.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from ms_diffsynth.diffusion.schedule import linspace, obeyed
from ms_diffsynth.diffusion.units import FlowMatchLoss, Objective, Random
from ms_diffsynth.errors import ConfigError, listing, naming, nearest
from ms_diffsynth.ops.clamp import clamp
from ms_diffsynth.units import TensorUnit

CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "variance_type": ("fixed_small", "fixed_large"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
# classes of diffusers whose file a `NoiseSchedule` is read from -> their defaults that are others than those here
KINDS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {}, "DDIMScheduler": {},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace", "clip_sample": False}}
# settings of these at the only value that is computed here; those of the second serve one of the first, or nothing
FIXED = {"thresholding": False, "trained_betas": None, "interpolation_type": "linear", "use_karras_sigmas": False,
         "timestep_type": "discrete", "final_sigmas_type": "zero"}
UNUSED = ("dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps")
LEAST_ALPHA = 2.0**-24  # what EulerDiscreteScheduler takes for an alphas_cumprod of 0

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents [B, ...], timestep_index int32 [B]) -> prediction [B, ...]
Noise = Callable[[int], Tensor]  # number of the sampling step -> noise [B, ...]


# -- the forward process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """How noise is added and taken away; every field is diffusers' setting of that name, with its default.

    Raises: ConfigError for a value that is none of ``CHOICES``, or a number that no schedule has.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        _check_choices({name: getattr(self, name) for name in CHOICES})
        wrong = [f"{name}={getattr(self, name)}: expected {expected}" for name, expected, is_right in (
            ("num_train_timesteps", "1 to 100000", 1 <= self.num_train_timesteps <= 100_000),
            ("beta_start", "a number above 0 and below 1", 0 < self.beta_start < 1),
            ("beta_end", "a number above 0 and below 1", 0 < self.beta_end < 1),
            ("clip_sample_range", "a number above 0, up to 1000", 0 < self.clip_sample_range <= 1000),
            ("steps_offset", "0 to num_train_timesteps", 0 <= self.steps_offset <= self.num_train_timesteps),
            ("prediction_type", "v_prediction or sample with a zero terminal SNR, where epsilon tells nothing of the "
             "image", not self.rescale_betas_zero_snr or self.prediction_type != "epsilon"))
            if not is_right]
        if wrong:
            raise ConfigError(f"{listing(wrong)}. Give the noise schedule the network was trained with.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a ``scheduler_config.json`` of one of ``KINDS``.

        Raises: ConfigError for another class, and listing every setting that is not supported.
        """
        with naming("scheduler_config.json"):
            found = obeyed(cls, config, tuple(KINDS), FIXED, UNUSED)
            return cls(**{**KINDS[config["_class_name"]], **found})

    def to_config(self) -> dict[str, Any]:
        """A ``scheduler_config.json`` that diffusers reads. (set_alpha_to_one is of DDIMScheduler alone.)"""
        settings = {n: v for n, v in asdict(self).items() if n != "set_alpha_to_one"}
        return {"_class_name": "DDPMScheduler", "_diffusers_version": "0.35.2", **settings}

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """a_t, float32 [num_train_timesteps], read-only: products in float64 of float32 factors, as PyTorch's."""
        n = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = linspace(self.beta_start, self.beta_end, n)
        elif self.beta_schedule == "scaled_linear":
            betas = linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        else:  # Nichol and Dhariwal 2021 (2102.09672), equation 17
            left = [math.cos((k / n + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(n + 1)]
            betas = np.array([min(1 - left[k + 1] / left[k], 0.999) for k in range(n)], np.float32)
        products = _products(np.float32(1) - betas)
        if self.rescale_betas_zero_snr:  # Lin et al. 2023 (2305.08891), algorithm 1
            roots = np.sqrt(products)
            roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
            products = roots**2
            betas = np.float32(1) - np.append(products[:1], products[1:] / products[:-1])
            products = _products(np.float32(1) - betas)
        products.setflags(write=False)
        return products

    @property
    def sigmas(self) -> np.ndarray:
        """sqrt(1 - a_t), float32 [num_train_timesteps], rising."""
        return np.sqrt(np.float32(1) - self.alphas_cumprod)

    def _check_steps(self, n: int) -> None:
        if not 1 <= n <= self.num_train_timesteps:
            raise ConfigError(f"num_inference_steps={n}: expected 1 to {self.num_train_timesteps}, the timesteps of "
                              "training.")

    def timesteps(self, num_inference_steps: int) -> np.ndarray:
        """The timesteps of sampling, int64 [n], falling. Source: Lin et al. 2023 (2305.08891), table 2.

        Raises: ConfigError for more steps than there are timesteps, for none, or for a steps_offset that leads beyond.
        """
        n, total = num_inference_steps, self.num_train_timesteps
        self._check_steps(n)
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, n).round()[::-1].astype(np.int64)
        if self.timestep_spacing == "trailing":  # rounding may leave an n + 1st value just above 0, as in diffusers
            return np.round(np.arange(total, 0, -total / n)[:n]).astype(np.int64) - 1
        timesteps = np.arange(n)[::-1] * (total // n) + self.steps_offset
        if not 0 <= timesteps[-1] <= timesteps[0] < total:
            raise ConfigError(f"num_inference_steps={n} with timestep_spacing=leading and steps_offset="
                              f"{self.steps_offset}: the timesteps {timesteps[-1]} to {timesteps[0]} are not within 0 "
                              f"and {total - 1}. Take fewer steps, or a steps_offset of 0.")
        return timesteps

    def sampling_sigmas(self, num_inference_steps: int) -> np.ndarray:
        """The s of sampling, sqrt((1 - a) / a) at the timesteps, and a final 0: float32 [n + 1], falling.

        Evenly spaced timesteps (linspace) are not rounded here. Source: diffusers 0.39, EulerDiscreteScheduler.
        """
        if self.timestep_spacing == "linspace":
            self._check_steps(num_inference_steps)
            last = self.num_train_timesteps - 1
            timesteps = np.linspace(0, last, num_inference_steps, dtype=np.float32)[::-1]
        else:
            timesteps = self.timesteps(num_inference_steps)
        levels = self._levels
        return np.append(np.interp(timesteps, np.arange(len(levels)), levels), 0).astype(np.float32)

    @cached_property
    def _levels(self) -> np.ndarray:
        """s of every timestep, float32."""
        a = np.maximum(self.alphas_cumprod, np.float32(LEAST_ALPHA))
        return np.sqrt((np.float32(1) - a) / a)

    def timestep_at(self, sigma: float) -> float:
        """The timestep at which s is ``sigma``: `sampling_sigmas` the other way round."""
        found = float(np.interp(sigma, self._levels, np.arange(len(self._levels))))
        return float(round(found)) if abs(found - round(found)) < 1e-3 else found

    def first_scale(self, sigma: float) -> float:
        """What normal noise is multiplied by to stand for latents at s = ``sigma``, where sampling starts.

        Source: diffusers 0.39, EulerDiscreteScheduler.init_noise_sigma.
        """
        return sigma if self.timestep_spacing in ("linspace", "trailing") else math.sqrt(sigma**2 + 1)

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: float) -> Tensor:
        """d latents / d s at s = ``sigma``, of what the network predicts of latents / sqrt(s^2 + 1)."""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return (latents - prediction) / sigma
        return prediction / math.sqrt(sigma**2 + 1) + latents * (sigma / (sigma**2 + 1))

    def loss_weights(self, snr_gamma: float | None) -> np.ndarray:
        """The loss weight of every timestep, float32 [num_train_timesteps]: 1, or the min-SNR weight.

        With snr = a / (1 - a): min(snr, gamma) weighs the error of the image; the errors of epsilon and of v are
        that one times snr and snr + 1, so their weights are divided by these.

        Source: Hang et al. 2023 (2303.09556), section 3.4 and equation 8.
        """
        if snr_gamma is None:
            return np.ones(self.num_train_timesteps, np.float32)
        a = self.alphas_cumprod.astype(np.float64)
        snr = a / (1 - a)  # 0 at the last timestep of a zero terminal SNR, which then weighs nothing for v
        per_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[self.prediction_type]
        return (np.minimum(snr, snr_gamma) / per_error).astype(np.float32)


def _products(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _check_choices(values: Mapping[str, str]) -> None:
    wrong = [f"{n}='{v}': expected one of {', '.join(CHOICES[n])}.{nearest(v, CHOICES[n])}"
             for n, v in values.items() if v not in CHOICES[n]]
    if wrong:
        raise ConfigError("\n".join(wrong))


# -- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DDPMObjective:
    """What DDPM training minimises. Timesteps are drawn uniformly.

    Attributes:
        prediction_type: what the network learns to give; None is what its scheduler_config.json says.
        snr_gamma: gamma of the min-SNR weights, 5 in the paper; None weighs all timesteps alike.
        noise_offset: standard deviation of what is added to the noise of a whole channel, so that very dark and very
            light images are learnt.
        zero_terminal_snr: rescale the noise schedule so that its last timestep is noise alone.
        random_flip: mirror every image left to right with probability 1/2, anew at every step.
    """

    prediction_type: str | None = None
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    zero_terminal_snr: bool = False
    random_flip: bool = False

    # of every objective (`diffusion.units.Objective`); pixels have no posterior, and unnamed images no class
    inputs = ()
    posterior = "mean"
    prior_loss_weight = None
    level_draw = "timestep_index"
    metrics = saved_models = ()

    def __post_init__(self):
        if self.prediction_type is not None:
            _check_choices({"prediction_type": self.prediction_type})
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ConfigError(f"snr_gamma={self.snr_gamma}: expected a number above 0. Try 5, or None for no weights.")

    def __str__(self) -> str:
        """The line that a run logs about it at its start."""
        weights = "equal" if self.snr_gamma is None else f"min-SNR {self.snr_gamma:g}"
        further = {f", noise offset {self.noise_offset:g}": self.noise_offset, ", zero terminal SNR":
                   self.zero_terminal_snr, ", images mirrored at random": self.random_flip}
        return (f"the network predicts {self.prediction_type or 'what its scheduler_config.json says'}, loss weights "
                f"{weights}{''.join(text for text, is_on in further.items() if is_on)}")

    @property
    def draws(self) -> tuple[str, ...]:
        """The random slots this objective reads."""
        return ("noise", "timestep_index", *(["noise_offset_draw"] if self.noise_offset else []),
                *(["flip_draw"] if self.random_flip else []))

    def draw(self, name: str, shape: tuple[int, ...], grid_size: int, random: Random) -> np.ndarray:
        """As `diffusion.units.Objective.draw`: timesteps are uniform, and so is what decides on a mirror image; the
        noise has an offset for each channel."""
        if name == "flip_draw":
            return random(name, "uniform", shape[:1])
        if name == "noise_offset_draw":
            return random(name, "normal", (*shape[:2], *[1] * (len(shape) - 2)))
        return Objective().draw(name, shape, grid_size, random)

    def validated(self) -> DDPMObjective:
        return self

    def units(self, pipe: Any, sigmas: np.ndarray) -> list[TensorUnit]:
        """As `diffusion.tasks.Task.units`."""
        return ddpm_units(self, pipe.schedule_for(self), pipe.denoise)


@dataclass(frozen=True, kw_only=True)
class LatentDDPMObjective(DDPMObjective):
    """The same on a VAE's latents.

    Attributes:
        posterior: ``"mean"`` or ``"sample"`` of the VAE's posterior.
        prior_loss_weight: weight of the class images; None when there are none.

    Raises: ConfigError with ``random_flip``: the latents of a mirrored image are not mirrored latents.
    """

    posterior: str = "sample"
    prior_loss_weight: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.random_flip:
            raise ConfigError("random_flip=true: the latents of a mirrored image are not mirrored latents. Remove it, "
                              "and put mirrored copies of the images into the data set.")

    def __str__(self) -> str:
        prior = "" if self.prior_loss_weight is None else f", class images weigh {self.prior_loss_weight:g}"
        return f"{super().__str__()}, {self.posterior} of the VAE's posterior{prior}"

    @property
    def draws(self) -> tuple[str, ...]:
        return (*super().draws, *(["posterior_noise"] if self.posterior == "sample" else []))

    def validated(self) -> LatentDDPMObjective:
        return replace(self, prior_loss_weight=None)


class OffsetNoise(TensorUnit):
    """Noise whose channels have a mean of their own.

    Shapes: noise float32 [B, C, ...], noise_offset_draw float32 [B, C, 1, ...] -> offset_noise as noise.
    """

    input_params = ("noise", "noise_offset_draw")
    output_params = ("offset_noise",)

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def construct(self, noise, noise_offset_draw):
        return (noise + self.scale * noise_offset_draw,)


class RandomFlip(TensorUnit):
    """Images mirrored left to right where the draw is below 1/2.

    Shapes: input_latents float32 [B, 3, H, W], flip_draw float32 [B] in [0, 1) -> flipped_latents float32 [B, 3, H, W].
    """

    input_params = ("input_latents", "flip_draw")
    output_params = ("flipped_latents",)

    def construct(self, input_latents, flip_draw):
        is_flipped = (flip_draw < 0.5).reshape((-1, 1, 1, 1))
        return (ops.select(is_flipped.broadcast_to(input_latents.shape), ops.flip(input_latents, (3,)), input_latents),)


class LookupNoise(TensorUnit):
    """Scales of image and noise, and the loss weight, by timestep.

    Shapes: timestep_index int32 [B] -> signal_scale, sigma, loss_weight float32 [B].
    """

    input_params = ("timestep_index",)
    output_params = ("signal_scale", "sigma", "loss_weight")

    def __init__(self, schedule: NoiseSchedule, snr_gamma: float | None = None):
        super().__init__()
        self.signal_scales = Tensor(np.sqrt(schedule.alphas_cumprod))
        self.sigmas = Tensor(schedule.sigmas)
        self.weights = Tensor(schedule.loss_weights(snr_gamma))

    def construct(self, timestep_index):
        return (mint.index_select(self.signal_scales, 0, timestep_index),
                mint.index_select(self.sigmas, 0, timestep_index), mint.index_select(self.weights, 0, timestep_index))


class AddNoise(TensorUnit):
    """The noisy latents, and what the network is to predict of them.

    Shapes: input_latents (or flipped_latents), noise (or offset_noise) float32 [B, ...], signal_scale, sigma
    float32 [B] -> latents, target float32 [B, ...].
    """

    output_params = ("latents", "target")

    def __init__(self, prediction_type: str, image: str = "input_latents", noise: str = "noise"):
        super().__init__()
        self.input_params = (image, noise, "signal_scale", "sigma")
        self.prediction_type = prediction_type

    def construct(self, image, noise, signal_scale, sigma):
        a = signal_scale.reshape((-1, 1, 1, 1))
        s = sigma.reshape((-1, 1, 1, 1))
        target = noise
        if self.prediction_type == "sample":
            target = image
        elif self.prediction_type == "v_prediction":
            target = a * noise - s * image
        return a * image + s * noise, target


class PredictionLoss(FlowMatchLoss):
    """`diffusion.units.FlowMatchLoss` of the prediction.

    Shapes: prediction, target float [B, ...], loss_weight float32 [B] -> loss float32 scalar, sample_losses [B].
    """

    input_params = ("prediction", "target", "loss_weight")


def ddpm_units(objective: DDPMObjective, schedule: NoiseSchedule, denoise: TensorUnit) -> list[TensorUnit]:
    """From ``input_latents`` and the draws to ``loss``, with the family's ``denoise`` in the middle.

    ``schedule.prediction_type`` is what is predicted; that of the objective has been put there before.
    """
    image = "flipped_latents" if objective.random_flip else "input_latents"
    noise = "offset_noise" if objective.noise_offset else "noise"
    return [
        *([RandomFlip()] if objective.random_flip else []),
        *([OffsetNoise(objective.noise_offset)] if objective.noise_offset else []),
        LookupNoise(schedule, objective.snr_gamma),
        AddNoise(schedule.prediction_type, image, noise),
        denoise,
        PredictionLoss(objective.prior_loss_weight),
    ]


# -- sampling --------------------------------------------------------------------------------------------------------


def ddpm(predict: Predict, latents: Tensor, schedule: NoiseSchedule, num_inference_steps: int, noise: Noise,
         on_step: Callable[[int, int], None] | None = None, last: int | None = None) -> Tensor:
    """Ancestral sampling: each step draws from the posterior of the one before, given the predicted image.

    Shapes: latents float32 [B, ...], standard normal -> float32 [B, ...], an image in about [-1, 1].

    Args:
        noise: called for every step but one that starts at t = 0.
        on_step: called after every step with (steps done, steps in all).
        last: walk the last steps alone, so many; the latents are at the first of them.
    Source: Ho et al. 2020, equation 7; diffusers 0.39, DDPMScheduler.step.
    """
    timesteps = schedule.timesteps(num_inference_steps)[-(last or num_inference_steps):]
    for k, t in enumerate(timesteps):
        a = schedule.alphas_cumprod[t]
        a_next = schedule.alphas_cumprod[timesteps[k + 1]] if k + 1 < len(timesteps) else _one
        image, _ = _image_and_noise(schedule, predict(latents, _batch(latents, t)), latents, a)
        step = a / a_next  # alpha of this step, which may pass over several timesteps
        latents = (float(np.sqrt(a_next) * (_one - step) / (_one - a)) * image
                   + float(np.sqrt(step) * (_one - a_next) / (_one - a)) * latents)
        if t > 0:
            variance = _one - step
            if schedule.variance_type == "fixed_small":
                variance = max((_one - a_next) / (_one - a) * variance, np.float32(1e-20))
            latents = latents + float(np.sqrt(variance)) * noise(k)
        if on_step is not None:
            on_step(k + 1, len(timesteps))
    return latents


def ddim(predict: Predict, latents: Tensor, schedule: NoiseSchedule, num_inference_steps: int, eta: float = 0.0,
         noise: Noise | None = None, on_step: Callable[[int, int], None] | None = None,
         last: int | None = None) -> Tensor:
    """Deterministic sampling with ``eta`` 0; with 1 as much noise is added at every step as by `ddpm`.

    Shapes, Args: as `ddpm`; ``noise`` is needed where ``eta`` is not 0.
    Source: Song et al. 2021, equation 12; diffusers 0.39, DDIMScheduler.step.
    """
    timesteps = schedule.timesteps(num_inference_steps)[-(last or num_inference_steps):]
    stride = schedule.num_train_timesteps // num_inference_steps
    a_last = _one if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    for k, t in enumerate(timesteps):
        a = schedule.alphas_cumprod[t]
        a_next = schedule.alphas_cumprod[t - stride] if t >= stride else a_last
        image, predicted = _image_and_noise(schedule, predict(latents, _batch(latents, t)), latents, a)
        deviation = np.float32(eta) * np.sqrt((_one - a_next) / (_one - a) * (_one - a / a_next))
        latents = (float(np.sqrt(a_next)) * image
                   + float(np.sqrt(_one - a_next - deviation**2)) * predicted)
        if eta > 0:
            latents = latents + float(deviation) * noise(k)
        if on_step is not None:
            on_step(k + 1, len(timesteps))
    return latents


_one = np.float32(1)


def _batch(latents: Tensor, t: int) -> Tensor:
    return Tensor(np.full(latents.shape[0], t, np.int32))


def _image_and_noise(schedule: NoiseSchedule, prediction: Tensor, latents: Tensor,
                       a: np.float32) -> tuple[Tensor, Tensor]:
    """The clean image, clipped, and the noise that a prediction stands for."""
    prediction = prediction.astype(ms.float32)
    signal_scale, sigma = float(np.sqrt(a)), float(np.sqrt(_one - a))
    if schedule.prediction_type == "epsilon":
        image, noise = (latents - sigma * prediction) / signal_scale, prediction
    elif schedule.prediction_type == "sample":
        image, noise = prediction, (latents - signal_scale * prediction) / sigma
    else:
        image = signal_scale * latents - sigma * prediction
        noise = signal_scale * prediction + sigma * latents
    if schedule.clip_sample:
        image = clamp(image, -schedule.clip_sample_range, schedule.clip_sample_range)
    return image, noise
