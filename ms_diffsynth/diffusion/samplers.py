"""From noise to data: integrate the velocity of flow matching along a list of sigmas.

On the straight path latents = (1 - sigma) x + sigma n, so with the velocity v = n - x the clean x is
latents - sigma v. A sampler is a function with the signature of `Sampler`, and a line in ``SAMPLERS``.
"""
from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import mindspore as ms
import numpy as np
from mindspore import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (latents [B, ...], sigma float32 [B]) -> velocity [B, ...]
OnStep = Callable[[int, int], None]  # called after every step with (steps done, steps in all)


class Sampler(Protocol):
    """Integrates from the first of ``sigmas`` to the last, a step from each to the next."""

    def __call__(self, denoise: Denoise, latents: Tensor, sigmas: np.ndarray, on_step: OnStep | None = None) -> Tensor:
        """Shapes: latents float32 [B, ...], at ``sigmas[0]``; sigmas float32 [n + 1], falling, the last may be 0 ->
        float32 [B, ...], at ``sigmas[-1]``."""


def euler(denoise: Denoise, latents: Tensor, sigmas: np.ndarray, on_step: OnStep | None = None) -> Tensor:
    """Euler's method, exact where the velocity is constant: x += v (s_next - s). One call of the network a step.

    Source: Karras et al. 2022 (2206.00364), algorithm 1 without churn; diffusers 0.39, FlowMatchEulerDiscreteScheduler.
    """
    latents = latents.astype(ms.float32)
    sigmas = np.asarray(sigmas, np.float32)
    for i in range(len(sigmas) - 1):
        velocity = _at(denoise, latents, sigmas[i])
        latents = latents + velocity * float(sigmas[i + 1] - sigmas[i])
        _tell(on_step, i, sigmas)
    return latents


def heun(denoise: Denoise, latents: Tensor, sigmas: np.ndarray, on_step: OnStep | None = None) -> Tensor:
    """Heun's method, of second order: the mean of the velocities at both ends. Two calls of the network a step, one in
    the step to sigma 0.

    Source: Karras et al. 2022 (2206.00364), algorithm 1 without churn; diffusers 0.39, FlowMatchHeunDiscreteScheduler.
    """
    latents = latents.astype(ms.float32)
    sigmas = np.asarray(sigmas, np.float32)
    for i in range(len(sigmas) - 1):
        step = float(sigmas[i + 1] - sigmas[i])
        velocity = _at(denoise, latents, sigmas[i])
        if sigmas[i + 1] > 0:
            velocity = (velocity + _at(denoise, latents + velocity * step, sigmas[i + 1])) * 0.5
        latents = latents + velocity * step
        _tell(on_step, i, sigmas)
    return latents


def dpmpp_2m(denoise: Denoise, latents: Tensor, sigmas: np.ndarray, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++ (2M), of second order with one call of the network a step: it remembers the clean x of the step
    before. The first step and the step to sigma 0 are of first order.

    With a = 1 - sigma and h the growth of log(a / sigma) in a step, D = x + (x - x_before) h / (2 h_before) and
    latents = (s_next / s) latents + (a_next - a s_next / s) D.

    Source: Lu et al. 2022 (2211.01095), algorithm 2; diffusers 0.39, DPMSolverMultistepScheduler with use_flow_sigmas
        and prediction_type flow_prediction.
    """
    latents = latents.astype(ms.float32)
    levels = np.asarray(sigmas, np.float32).astype(np.float64)
    with np.errstate(divide="ignore"):
        growth = np.diff(np.log(1 - levels) - np.log(levels))  # infinite from sigma 1 on, and to sigma 0
    before = None
    for i, (sigma, following) in enumerate(pairwise(levels)):
        clean = latents - _at(denoise, latents, sigma) * float(sigma)
        estimate = clean
        if before is not None and following > 0:
            estimate = clean + (clean - before) * float(growth[i] / (2 * growth[i - 1]))
        kept = following / sigma
        latents = latents * float(kept) + estimate * float((1 - following) - (1 - sigma) * kept)
        before = clean
        _tell(on_step, i, sigmas)
    return latents


def _at(denoise: Denoise, latents: Tensor, sigma: float) -> Tensor:
    return denoise(latents, Tensor(np.full(latents.shape[0], sigma, np.float32))).astype(ms.float32)


def _tell(on_step: OnStep | None, i: int, sigmas: np.ndarray) -> None:
    if on_step is not None:
        on_step(i + 1, len(sigmas) - 1)


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
