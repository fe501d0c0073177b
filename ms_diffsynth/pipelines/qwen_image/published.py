"""Qwen-Image as it is published: the settings of its transformer and VAE, without the weights.

Source: Qwen/Qwen-Image on the Hugging Face hub, ``transformer/config.json`` and ``vae/config.json``, which are also the
defaults of diffusers 0.42.1, QwenImageTransformer2DModel and AutoencoderKLQwenImage. DiffSynth-Studio knows the
transformer's files by the hash of their names and shapes, and a network of these settings has that hash
(tests/golden/published.json).
"""
from __future__ import annotations

from typing import Any

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
    "latents_mean": [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
                     -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
    "latents_std": [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
                    1.6382, 1.1253, 2.8251, 1.916]}
_DIT: dict[str, Any] = {
    "_class_name": "QwenImageTransformer2DModel", "patch_size": 2, "in_channels": 64, "out_channels": 16,
    "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584,
    "guidance_embeds": False, "axes_dims_rope": [16, 56, 56]}

# Qwen/Qwen2.5-VL-7B-Instruct; its tower for images takes part in editing alone
_QWEN25_VL_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_act": "silu",
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False},
    "vision_config": {
        "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu"}}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "Qwen-Image": {"dit": _DIT, "vae": _VAE, "text_encoder": _QWEN25_VL_7B},
    # the same shapes: zero_cond_t adds no weights
    "Qwen-Image-Edit-2511": {"dit": _DIT | {"zero_cond_t": True}, "vae": _VAE, "text_encoder": _QWEN25_VL_7B}}
# Source: InstantX/Qwen-Image-ControlNet-Union, ``config.json``
CONTROLNETS: dict[str, dict[str, Any]] = {
    "Qwen-Image-ControlNet-Union": {
        "_class_name": "QwenImageControlNetModel", "num_layers": 5, "extra_condition_channels": 0,
        **{name: _DIT[name] for name in ("patch_size", "in_channels", "out_channels", "attention_head_dim",
                                         "num_attention_heads", "joint_attention_dim", "axes_dims_rope")}}}
REPOSITORIES = {f"Qwen/{name}": name if name in PUBLISHED else "Qwen-Image" for name in (
    "Qwen-Image", "Qwen-Image-2512", "Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511")}


def prepared_shapes(configs: dict[str, dict[str, Any]], latent: tuple[int, int, int],
                    text_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the prepared slots of a row, for latents [C, h, w] and a prompt of ``text_tokens``."""
    return {"moments": (2 * latent[0], *latent[1:]), "prompt_mask": (text_tokens,),
            "prompt_embeds": (text_tokens, configs["dit"]["joint_attention_dim"])}
