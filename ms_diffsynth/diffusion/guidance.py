"""Classifier-free guidance: two branches and one velocity."""
from __future__ import annotations

from mindspore import Tensor

from ms_diffsynth.diffusion.sampler import Denoise


def classifier_free(denoise_positive: Denoise, denoise_negative: Denoise, cfg_scale: float) -> Denoise:
    """The velocity away from the negative branch: v_neg + cfg_scale (v_pos - v_neg).

    With ``cfg_scale`` 1 the negative branch cancels, and is not run.

    Source: Ho and Salimans 2022 (2207.12598), equation 6, in the parametrisation where 1 means no guidance.
    """
    if cfg_scale == 1:
        return denoise_positive

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        negative = denoise_negative(latents, sigma)
        return negative + cfg_scale * (denoise_positive(latents, sigma) - negative)

    return denoise
