"""Training a VAE to give images back: pixels to a sample of its posterior, and back to pixels.

Source: Esser et al. 2021 (2012.09841) for the parts of the loss, here without a discriminator; Zhang et al. 2018
(1801.03924) for distances between features, here of EfficientNet-Lite0 and without learned weights.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from ms_diffsynth.diffusion.units import Random, SampleLatents
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.evaluate.network import PerceptualFeatures
from ms_diffsynth.evaluate.weights import load_weights
from ms_diffsynth.ops.clamp import clamp
from ms_diffsynth.units import PipelineUnit, TensorUnit

DECIBEL = 10 / float(np.log(10))


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """What training a VAE minimises: L1 + weighted squared error, distance of features, and KL divergence.

    Attributes:
        mse_weight: of the mean squared error, where the mean absolute error has 1.
        perceptual_weight: of the distance between features of EfficientNet-Lite0; 0 needs no extra [eval].
        kl_weight: of the posterior's KL divergence from a normal distribution, the mean over its numbers.
        crop_size: sides in pixels of a square cut out of every image anew at each step; None trains on whole images.
        random_flip: mirror every image left to right with probability 1/2, anew at every step.
        posterior: ``"sample"``, or ``"mean"``, which is never blurred by noise.
    """

    mse_weight: float = 2.0
    perceptual_weight: float = 0.15
    kl_weight: float = 3e-4
    crop_size: int | None = None
    random_flip: bool = False
    posterior: str = "sample"

    inputs = ()
    prior_loss_weight = None
    level_draw = None
    metrics = ("psnr",)
    saved_models = ("vae",)

    def __str__(self) -> str:
        """The line that a run logs about it at its start."""
        images = "whole images" if self.crop_size is None else f"squares of {self.crop_size} pixels"
        return (f"reconstruction of {images}{', mirrored at random' if self.random_flip else ''}: L1 + "
                f"{self.mse_weight:g} squared error + {self.perceptual_weight:g} perceptual distance + "
                f"{self.kl_weight:g} KL divergence, {self.posterior} of the posterior")

    @property
    def draws(self) -> tuple[str, ...]:
        """The random slots this task reads."""
        return ((("posterior_noise",) if self.posterior == "sample" else ())
                + (("view_draw",) if self.crop_size or self.random_flip else ()))

    def draw(self, name: str, shape: tuple[int, ...], grid_size: int, random: Random) -> np.ndarray:
        """As `diffusion.tasks.Task.draw`."""
        return random(name, "uniform", (shape[0], 3)) if name == "view_draw" else random(name, "normal", shape)

    def validated(self) -> Autoencoder:
        """The task as held-out images are looked at: whole, and by the mean of the posterior."""
        return replace(self, crop_size=None, random_flip=False, posterior="mean")

    def units(self, pipe, sigmas: np.ndarray) -> list[PipelineUnit | TensorUnit]:
        """As `diffusion.tasks.Task.units`. Raises: ConfigError for a pipeline without a VAE."""
        encode = next((unit for unit in pipe.units if "moments" in unit.output_params), None)
        if encode is None:
            raise ConfigError(f"task=autoencoder: {type(pipe).__name__} has no VAE. Expected a family that has one, "
                              "such as flux.")
        if pipe.medium != "image":
            raise ConfigError(f"task=autoencoder: {type(pipe).__name__} makes {pipe.medium}s, and views are cut out of "
                              "images. Expected a family of images, such as flux.")
        view = RandomView(self.crop_size, self.random_flip, self.posterior == "sample")
        sample = SampleLatents(self.posterior)
        noise = {"posterior_noise": "view_noise"} if sample.is_sampled else {}
        return [
            view,
            type(encode)(encode.dtype).with_slots({"pixels": "view"}, {"moments": "view_moments"}),
            sample.with_slots({"moments": "view_moments", **noise}, {"input_latents": "view_latents"}),
            pipe.build_decode().with_slots({"latents": "view_latents"}, {"pixels": "reconstruction"}),
            ReconstructionLoss(self.mse_weight, self.perceptual_weight, self.kl_weight),
        ]


class RandomView(TensorUnit):
    """A square of each image at a random place, mirrored or not, and as much of the noise as its latents need.

    Shapes: pixels float32 [B, 3, H, W], posterior_noise float32 [B, C, h, w], view_draw float32 [B, 3] in [0, 1)
    (row, column, mirrored below 1/2) -> view [B, 3, S, S] with crop_size S, else [B, 3, H, W]; view_noise
    [B, C, S h / H, S w / W].
    """

    output_params = ("view", "view_noise")

    def __init__(self, crop_size: int | None, random_flip: bool, is_sampled: bool):
        super().__init__()
        self.crop_size, self.random_flip, self.is_sampled = crop_size, random_flip, is_sampled
        self.is_random = crop_size is not None or random_flip
        self.input_params = (("pixels",) + (("posterior_noise",) if is_sampled else ())
                             + (("view_draw",) if self.is_random else ()))
        self.output_params = ("view", "view_noise") if is_sampled else ("view",)

    def construct(self, pixels, *drawn):
        view, (height, width) = pixels, pixels.shape[2:]
        size = (height, width) if self.crop_size is None else (self.crop_size, self.crop_size)
        if self.is_random:  # by products with zeros and ones, which are exact and have kernels on every device
            row, column, mirrored = mint.split(drawn[-1], 1, 1)
            is_mirrored = (mirrored < 0.5).astype(ms.float32) if self.random_flip else 0.0 * mirrored
            view = mint.matmul(_selection(row, height, size[0], 0.0 * row), pixels)
            view = mint.matmul(view, _selection(column, width, size[1], is_mirrored).swapaxes(2, 3))
        if not self.is_sampled:
            return (view,)
        noise = drawn[0]
        if self.crop_size is not None:
            noise = mint.split(noise, noise.shape[2] * size[0] // height, 2)[0]
            noise = mint.split(noise, noise.shape[3] * size[1] // width, 3)[0]
        return view, noise


def _selection(draw, length, size, is_mirrored):
    """``size`` neighbours among ``length``, in reverse order where ``is_mirrored`` is 1: ones and zeros
    float32 [B, 1, size, length], from float32 [B, 1] in [0, 1).
    """
    first = mint.floor(draw * (length - size + 1))
    order = Tensor(np.arange(size), ms.float32)
    place = first + order + is_mirrored * (size - 1 - 2 * order)
    return (place.expand_dims(2) == Tensor(np.arange(length), ms.float32)).astype(ms.float32).expand_dims(1)


class ReconstructionLoss(TensorUnit):
    """How far a reconstruction is from the image, and the posterior from a normal distribution.

    Shapes: view, reconstruction float32 [B, 3, H, W] in [-1, 1], view_moments float32 [B, 2C, h, w] -> loss float32
    scalar, sample_losses float32 [B], psnr float32 [B], in dB, of the reconstruction clipped to [-1, 1].
    """

    input_params = ("view", "reconstruction", "view_moments")
    output_params = ("loss", "sample_losses", "psnr")

    def __init__(self, mse_weight: float, perceptual_weight: float, kl_weight: float):
        super().__init__()
        self.mse_weight, self.perceptual_weight, self.kl_weight = mse_weight, perceptual_weight, kl_weight
        self.is_perceptual = perceptual_weight > 0
        if self.is_perceptual:
            self.features = PerceptualFeatures(load_weights())

    def construct(self, view, reconstruction, view_moments):
        error = (reconstruction - view).reshape((view.shape[0], -1))
        losses = mint.mean(mint.abs(error), 1) + self.mse_weight * mint.mean(mint.square(error), 1)
        if self.is_perceptual:
            losses = losses + self.perceptual_weight * _distance(self.features(reconstruction),
                                                                 self.features(ops.stop_gradient(view)))
        mean, log_variance = mint.split(view_moments, view_moments.shape[1] // 2, 1)
        log_variance = clamp(log_variance, -30.0, 20.0)
        variance = ops.pow(Tensor(np.float32(np.e)), log_variance)  # as in `SampleLatents`
        divergence = 0.5 * (mint.square(mean) + variance - 1 - log_variance)
        losses = losses + self.kl_weight * mint.mean(divergence.reshape((view.shape[0], -1)), 1)
        clipped = (clamp(reconstruction, -1.0, 1.0) - view).reshape((view.shape[0], -1))
        psnr = DECIBEL * mint.log(4 / mint.mean(mint.square(clipped), 1))
        return mint.mean(losses), losses, psnr


def _distance(features, others):
    """Squared distance [B] of features, each pixel's made a unit vector; the mean over pixels and over layers."""
    total = 0.0
    for k in range(len(features)):
        difference = mint.square(_unit(features[k]) - _unit(others[k])).sum(1)
        total = total + mint.mean(difference.reshape((difference.shape[0], -1)), 1)
    return total / len(features)


def _unit(x):
    return x / mint.sqrt(mint.square(x).sum(1, keepdims=True) + 1e-6)
