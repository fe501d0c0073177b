"""Z-Image as it is published: the settings of its transformer and VAE, without the weights.

Source: ``transformer/config.json`` and ``vae/config.json`` of Tongyi-MAI/Z-Image and Tongyi-MAI/Z-Image-Turbo on the
Hugging Face hub, as public code that builds these networks quotes them. The transformer's are the defaults of diffusers
0.36, ZImageTransformer2DModel, but for ``axes_lens``; DiffSynth-Studio knows Turbo's files by the hash of their names
and shapes, and a network of these settings has that hash (tests/golden/published.json). The VAE is FLUX.1's.
Both models have the same settings: what tells them apart is the shift in scheduler_config.json (`z_image.pipeline`).
"""
from __future__ import annotations

from typing import Any

from ms_diffsynth.pipelines.shared.autoencoder_kl import FLUX_VAE
from ms_diffsynth.pipelines.shared.text import QWEN3

_DIT: dict[str, Any] = {
    "_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16,
    "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5,
    "qk_norm": True, "cap_feat_dim": 2560, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512]}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    name: {"dit": _DIT, "vae": FLUX_VAE, "text_encoder": QWEN3["Qwen3-4B"]} for name in ("Z-Image", "Z-Image-Turbo")
}
REPOSITORIES = {f"Tongyi-MAI/{name}": name for name in PUBLISHED}


def prepared_shapes(configs: dict[str, dict[str, Any]], latent: tuple[int, int, int],
                    text_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the prepared slots of a row, for latents [C, h, w] and a prompt of ``text_tokens``."""
    return {"moments": (2 * latent[0], *latent[1:]), "prompt_mask": (text_tokens,),
            "prompt_embeds": (text_tokens, configs["dit"]["cap_feat_dim"])}
