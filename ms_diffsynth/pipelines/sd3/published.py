"""Stable Diffusion 3 and 3.5 as they are published: the settings of transformers and VAE, without the weights.

Source: ``transformer/config.json`` and ``vae/config.json`` of stabilityai/stable-diffusion-3-medium-diffusers,
stable-diffusion-3.5-medium and stable-diffusion-3.5-large on the Hugging Face hub. These repositories are gated: the
values are those that other public code which builds these networks has, FastVideo's for one, and were not compared with
the files themselves.
"""
from __future__ import annotations

from typing import Any

from ms_diffsynth.pipelines.shared.text import CLIP_L, CLIP_TOKENS, T5_XXL

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "act_fn": "silu", "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 1.5305,
    "shift_factor": 0.0609, "force_upcast": True, "use_quant_conv": False, "use_post_quant_conv": False}
_MEDIUM: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
_MEDIUM_35 = _MEDIUM | {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}
_LARGE_35 = _MEDIUM | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                       "qk_norm": "rms_norm"}

_PROJECTED = {"architectures": ["CLIPTextModelWithProjection"]}
_CLIP_G = CLIP_L | _PROJECTED | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                                 "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280}
_OTHERS = {"vae": _VAE, "text_encoder_1": CLIP_L | _PROJECTED, "text_encoder_2": _CLIP_G, "text_encoder_3": T5_XXL}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "SD3-medium": {"dit": _MEDIUM, **_OTHERS},
    "SD3.5-medium": {"dit": _MEDIUM_35, **_OTHERS},
    "SD3.5-large": {"dit": _LARGE_35, **_OTHERS},
}
REPOSITORIES = {f"stabilityai/stable-diffusion-{name}": title for name, title in (
    ("3-medium-diffusers", "SD3-medium"), ("3.5-medium", "SD3.5-medium"), ("3.5-large", "SD3.5-large"))}


def prepared_shapes(configs: dict[str, dict[str, Any]], latent: tuple[int, int, int],
                    text_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the prepared slots of a row, for latents [C, h, w] and a prompt of ``text_tokens`` of T5."""
    dit = configs["dit"]
    return {"moments": (2 * latent[0], *latent[1:]),
            "prompt_embeds": (CLIP_TOKENS + text_tokens, dit["joint_attention_dim"]),
            "pooled_prompt_embeds": (dit["pooled_projection_dim"],)}
