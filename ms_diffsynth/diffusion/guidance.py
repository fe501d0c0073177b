"""Classifier-free guidance: two branches and one velocity."""
from __future__ import annotations

from mindspore import Tensor, ops

from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.diffusion.samplers import Denoise


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


def classifier_free_with_norms(denoise_positive: Denoise, denoise_negative: Denoise, cfg_scale: float) -> Denoise:
    """`classifier_free`, each 2x2 patch of the velocity scaled back to its norm in the positive branch.

    Source: diffusers 0.35, QwenImagePipeline.__call__ (true_cfg_scale).
    """
    if cfg_scale == 1:
        return denoise_positive

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        negative, positive = denoise_negative(latents, sigma), denoise_positive(latents, sigma)
        tokens = pack(negative + cfg_scale * (positive - negative))
        factor = _norms(pack(positive)) / ops.clamp(_norms(tokens), 1e-12)
        return unpack(tokens * factor, latents.shape[2], latents.shape[3])

    return denoise


def _norms(tokens: Tensor) -> Tensor:
    return ops.sqrt((tokens * tokens).sum(-1, keepdims=True))
