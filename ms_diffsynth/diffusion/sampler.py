"""From noise to data: integrate the velocity along a list of sigmas."""
from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (latents [B, ...], sigma float32 [B]) -> velocity [B, ...]


def euler(denoise: Denoise, latents: Tensor, sigmas: np.ndarray,
          on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """Euler's method, exact where the velocity is constant: x += v (s_next - s).

    Shapes: latents float32 [B, ...], at ``sigmas[0]``; sigmas float32 [n + 1] -> float32 [B, ...], at ``sigmas[-1]``.

    Args:
        on_step: called after every step with (steps done, steps in all).
    Source: Karras et al. 2022 (2206.00364), algorithm 1 without churn; diffusers 0.39, FlowMatchEulerDiscreteScheduler.
    """
    latents = latents.astype(ms.float32)
    sigmas = np.asarray(sigmas, np.float32)
    steps = len(sigmas) - 1
    for i in range(steps):
        velocity = denoise(latents, Tensor(np.full(latents.shape[0], sigmas[i])))
        latents = latents + velocity.astype(ms.float32) * float(sigmas[i + 1] - sigmas[i])
        if on_step is not None:
            on_step(i + 1, steps)
    return latents
