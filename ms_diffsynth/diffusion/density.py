"""From a raw random draw to a position on the training grid. NumPy only, on the host, where the draw is made.

An index is a floor, and a floor magnifies the last bit: with the device's sigmoid one index in 10,000 was another than
the reference's (MindSpore 2.10, CPU, 2026-11-28). Here u is computed in float64, rounded to float32 once, and
multiplied in float32, as PyTorch multiplies it.
"""
from __future__ import annotations

import math

import numpy as np

from ms_diffsynth.config import SETTINGS
from ms_diffsynth.errors import ConfigError, nearest

# The density of each scheme. The last four draw uniformly: they differ in the loss weight (`weighting`).
SCHEMES = (*SETTINGS["weighting_scheme"].metadata["choices"], "uniform")


def draw_kind(scheme: str) -> str:
    """The raw draw a scheme starts from: ``"normal"`` or ``"uniform"`` (in [0, 1)).

    Raises: ConfigError for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"weighting_scheme='{scheme}': expected one of {', '.join(SCHEMES)}."
                          f"{nearest(scheme, SCHEMES)}")
    return "normal" if scheme == "logit_normal" else "uniform"


def density(draw: np.ndarray, scheme: str, logit_mean: float = 0.0, logit_std: float = 1.0,
            mode_scale: float = 1.29) -> np.ndarray:
    """The position u that a raw draw stands for; 0 is the noisy end of the grid.

    Shapes: draw float32 [B], of `draw_kind(scheme)` -> u float32 [B], in [0, 1].

    Raises: ConfigError for an unknown scheme.
    Source: Esser et al. 2024, section 3.1; diffusers 0.39, compute_density_for_timestep_sampling.
    """
    u = np.asarray(draw).astype(np.float64)
    if draw_kind(scheme) == "normal":
        with np.errstate(over="ignore"):  # of a draw far out: u is 0 there
            u = 1 / (1 + np.exp(-(u * logit_std + logit_mean)))
    elif scheme == "mode":
        u = 1 - u - mode_scale * (np.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u.astype(np.float32)


def timestep_index(u: np.ndarray, n: int) -> np.ndarray:
    """Index of ``u`` on a grid of ``n``: int(u n), kept within 0 and n - 1 (u may round to 1).

    Shapes: u float32 [B] -> int32 [B].
    """
    return np.clip(np.asarray(u, np.float32) * np.float32(n), 0, n - 1).astype(np.int32)
