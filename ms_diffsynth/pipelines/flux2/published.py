"""FLUX.2 as it is published: the settings of its transformers and VAE, without the weights.

Source: ``transformer/config.json`` and ``vae/config.json`` of black-forest-labs/FLUX.2-dev, FLUX.2-klein-4B and
FLUX.2-klein-9B on the Hugging Face hub, as diffusers 0.42.1's defaults (dev) and DiffSynth-Studio's model_configs.py
(what klein has otherwise) give them; the base models have the same. DiffSynth-Studio knows the files of all three by
the hash of their names and shapes, and networks of these settings have those hashes (tests/golden/published.json).
"""
from __future__ import annotations

from typing import Any

from ms_diffsynth.pipelines.shared.text import QWEN3

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLFlux2", "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "act_fn": "silu", "latent_channels": 32,
    "norm_num_groups": 32, "sample_size": 1024, "force_upcast": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True, "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1,
    "patch_size": [2, 2]}
_DEV: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel", "patch_size": 1, "in_channels": 128, "out_channels": None,
    "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128, "num_attention_heads": 48,
    "joint_attention_dim": 15360, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": True}
_KLEIN_4B = _DEV | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
                    "guidance_embeds": False}
_KLEIN_9B = _DEV | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
                    "guidance_embeds": False}

# dev's: the language model of mistralai/Mistral-Small-3.2-24B-Instruct-2506
_MISTRAL: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0,
        "sliding_window": None}}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "FLUX.2-klein-4B": {"dit": _KLEIN_4B, "vae": _VAE, "text_encoder": QWEN3["Qwen3-4B"]},
    "FLUX.2-klein-9B": {"dit": _KLEIN_9B, "vae": _VAE, "text_encoder": QWEN3["Qwen3-8B"]},
    "FLUX.2-dev": {"dit": _DEV, "vae": _VAE, "text_encoder": _MISTRAL},
}
REPOSITORIES = {f"black-forest-labs/{base}": name for name in PUBLISHED
                for base in (name, name.replace("klein-", "klein-base-"))}


def prepared_shapes(configs: dict[str, dict[str, Any]], latent: tuple[int, int, int],
                    text_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the prepared slots of a row, for latents [C, h, w] and a prompt of ``text_tokens``."""
    return {"moments": (2 * latent[0], *latent[1:]),
            "prompt_embeds": (text_tokens, configs["dit"]["joint_attention_dim"])}
