"""Loss weights, one a sigma of the training grid, as a table that is looked up by the same index. NumPy only."""
from __future__ import annotations

import numpy as np

from ms_diffsynth.diffusion.density import SCHEMES, draw_kind

__all__ = ["SCHEMES", "bell_table", "table"]


def table(scheme: str, sigmas: np.ndarray) -> np.ndarray:
    """The loss weight of every sigma.

    ``sigma_sqrt``: s^-2; ``cosmap``: 2 / (pi (1 - 2s + 2s^2)); ``diffsynth``: `bell_table`; all others 1, because there
    the density alone decides which sigmas count. The sigmas must not be 0: no training grid holds 0.

    Shapes: sigmas float32 [N] -> float32 [N].
    Raises: ConfigError for an unknown scheme.
    Source: Esser et al. 2024, section 3.1; diffusers 0.39, compute_loss_weighting_for_sd3.
    """
    draw_kind(scheme)  # refuses an unknown scheme
    s = sigmas.astype(np.float64)
    if scheme == "sigma_sqrt":
        return (s ** -2).astype(np.float32)
    if scheme == "cosmap":
        return (2 / (np.pi * (1 - 2 * s + 2 * s**2))).astype(np.float32)
    if scheme == "diffsynth":
        return bell_table(sigmas)
    return np.ones_like(s, np.float32)


def bell_table(sigmas: np.ndarray) -> np.ndarray:
    """DiffSynth-Studio's weights: a Gaussian bell around s = 1/2, lowered to 0 at its foot, of mean 1.

    Shapes: sigmas float32 [N] -> float32 [N].
    Source: DiffSynth-Studio 2.1.12, FlowMatchScheduler.set_training_weight, for its grid of 1000.
    """
    bell = np.exp(-2 * (sigmas.astype(np.float64) - 0.5) ** 2)
    bell -= bell.min()
    return (bell / bell.mean()).astype(np.float32)
