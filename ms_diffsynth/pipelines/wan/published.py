"""Wan 2.1 and 2.2 as they are published: the settings of their networks, without the weights.

Source: ``config.json`` of the repositories Wan-AI/Wan2.*-Diffusers on the Hugging Face hub, as the defaults of
diffusers 0.42 and the configurations of Wan2.1, Wan2.2 and DiffSynth-Studio 2.1.12 have them.
"""
from __future__ import annotations

from typing import Any


def _dit(heads: int, layers: int, ffn: int, inputs: int = 16, outputs: int = 16, image: int | None = None,
         positions: int | None = None) -> dict[str, Any]:
    return {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": heads,
            "attention_head_dim": 128, "in_channels": inputs, "out_channels": outputs, "text_dim": 4096,
            "freq_dim": 256, "ffn_dim": ffn, "num_layers": layers, "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": image,
            "added_kv_proj_dim": None if image is None else 128 * heads, "rope_max_seq_len": 1024,
            "pos_embed_seq_len": positions}


VAE_21: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
    "latents_mean": [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
                     -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
    "latents_std": [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
                    1.6382, 1.1253, 2.8251, 1.916]}
VAE_22: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan", "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
                     0.0891, 0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
                     -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313,
                     -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
                     0.3573, -0.0548, -0.1681, -0.0667],
    "latents_std": [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
                    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
                    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]}

# of google/umt5-xxl
UMT5_XXL: dict[str, Any] = {
    "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": 256384, "d_model": 4096, "d_kv": 64,
    "d_ff": 10240, "num_layers": 24, "num_heads": 64, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu",
    "is_gated_act": True, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1, "tie_word_embeddings": False,
    "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
# of CLIP ViT-H/14 with XLM-RoBERTa, without its text encoder
IMAGE_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": 1280,
    "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
    "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": 1024}

_14B = (40, 40, 13824)
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    name: {"dit": dit, "vae": vae, "text_encoder": UMT5_XXL} for name, dit, vae in (
        ("Wan2.1-T2V-1.3B", _dit(12, 30, 8960), VAE_21),
        ("Wan2.1-T2V-14B", _dit(*_14B), VAE_21),
        ("Wan2.1-I2V-14B", _dit(*_14B, 36, image=1280), VAE_21),
        ("Wan2.1-FLF2V-14B", _dit(*_14B, 36, image=1280, positions=514), VAE_21),
        ("Wan2.2-I2V-A14B", _dit(*_14B, 36), VAE_21),
        ("Wan2.2-TI2V-5B", _dit(24, 30, 14336, 48, 48), VAE_22))}
# an expert of Wan2.2-T2V-A14B has the settings of Wan2.1-T2V-14B, and both experts have the same
PUBLISHED["Wan2.2-T2V-A14B"] = dict(PUBLISHED["Wan2.1-T2V-14B"])
for _name in ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B"):
    PUBLISHED[_name]["dit2"] = PUBLISHED[_name]["dit"]
REPOSITORIES = {
    f"Wan-AI/{repository}{end}": name for repository, name in (
        ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-1.3B"), ("Wan2.1-T2V-14B", "Wan2.1-T2V-14B"),
        ("Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B"), ("Wan2.1-I2V-14B-720P", "Wan2.1-I2V-14B"),
        ("Wan2.1-FLF2V-14B-720P", "Wan2.1-FLF2V-14B"), ("Wan2.2-T2V-A14B", "Wan2.2-T2V-A14B"),
        ("Wan2.2-I2V-A14B", "Wan2.2-I2V-A14B"), ("Wan2.2-TI2V-5B", "Wan2.2-TI2V-5B"))
    for end in ("", "-diffusers" if "FLF2V" in repository else "-Diffusers")}


def prepared_shapes(configs: dict[str, dict[str, Any]], latent: tuple[int, int, int, int],
                    text_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the prepared slots of a row, for latents [C, f, h, w]; text is 512 rows, however long."""
    channels, dit = latent[0], configs.get("dit") or configs["dit2"]  # the experts have the same settings
    shapes = {"moments": (2 * channels, *latent[1:]), "prompt_embeds": (512, dit["text_dim"])}
    if dit["in_channels"] != dit["out_channels"]:
        shapes["condition"] = (4 + channels, *latent[1:])
    if dit.get("image_dim"):
        shapes["image_embeds"] = (dit.get("pos_embed_seq_len") or 257, dit["image_dim"])
    return shapes
