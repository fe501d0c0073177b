"""2x2 patches of latents as tokens, and back.

Shape legend: B batch, C latent channels, H and W latent sides, N = H W / 4 tokens.
"""
from __future__ import annotations

from mindspore import Tensor, ops


def pack(latents: Tensor) -> Tensor:
    """2x2 patches as tokens: [B, C, H, W] -> [B, N, 4C].

    Source: diffusers 0.35 FluxPipeline._pack_latents.
    """
    b, c, h, w = latents.shape
    patches = ops.transpose(latents.reshape(b, c, h // 2, 2, w // 2, 2), (0, 2, 4, 1, 3, 5))
    return patches.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`: [B, N, 4C] -> [B, C, height, width], sides in latent pixels.

    Source: diffusers 0.35 FluxPipeline._unpack_latents.
    """
    b, _, d = tokens.shape
    patches = ops.transpose(tokens.reshape(b, height // 2, width // 2, d // 4, 2, 2), (0, 3, 1, 4, 2, 5))
    return patches.reshape(b, d // 4, height, width)
