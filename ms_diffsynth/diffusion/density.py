"""From a raw random draw to a position on the training grid. Runs inside the compiled step; draws nothing itself."""
from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from ms_diffsynth.errors import ConfigError, nearest

# The density of each scheme. The last four draw uniformly: they differ in the loss weight (`weighting`).
SCHEMES = ("logit_normal", "mode", "uniform", "none", "sigma_sqrt", "cosmap", "diffsynth")


def draw_kind(scheme: str) -> str:
    """The raw draw a scheme starts from: ``"normal"`` or ``"uniform"`` (in [0, 1)).

    Raises: ConfigError for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"weighting_scheme='{scheme}': expected one of {', '.join(SCHEMES)}."
                          f"{nearest(scheme, SCHEMES)}")
    return "normal" if scheme == "logit_normal" else "uniform"


_checked_kind = constexpr(draw_kind)  # evaluated while compiling, so that an unknown scheme raises there too


def density(draw: Tensor, scheme: str, logit_mean: float = 0.0, logit_std: float = 1.0,
            mode_scale: float = 1.29) -> Tensor:
    """The position u that a raw draw stands for; 0 is the noisy end of the grid.

    Shapes: draw float32 [B], of `draw_kind(scheme)` -> u float32 [B], in [0, 1].

    Raises: ConfigError for an unknown scheme.
    Source: Esser et al. 2024, section 3.1; diffusers 0.39, compute_density_for_timestep_sampling.
    """
    draw = draw.astype(ms.float32)
    if _checked_kind(scheme) == "normal":
        return ops.sigmoid(draw * logit_std + logit_mean)
    if scheme == "mode":
        cosine = ops.cos(draw * (math.pi / 2))
        return 1.0 - draw - mode_scale * (cosine * cosine - 1.0 + draw)
    return draw


def timestep_index(u: Tensor, n: int) -> Tensor:
    """Index of ``u`` on a grid of ``n``: int(u n), kept within 0 and n - 1 (u may round to 1).

    Shapes: u float32 [B] -> int32 [B].
    """
    return ops.minimum(ops.maximum(u.astype(ms.float32) * n, 0.0), n - 1.0).astype(ms.int32)
