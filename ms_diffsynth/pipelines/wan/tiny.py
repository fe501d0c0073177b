"""Wans of the real architecture, small enough for a laptop, with random weights: for tests and first runs."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ms_diffsynth.models import Component
from ms_diffsynth.pipelines.shared.text import T5_TOKENIZER
from ms_diffsynth.pipelines.shared.tiny import write_model
from ms_diffsynth.pipelines.wan.pipeline import COMPONENTS, IMAGE_EXPERTS, T2V_BOUNDARY, TEXT
from ms_diffsynth.pipelines.wan.published import VAE_21, VAE_22

CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": 32128, "d_model": 32, "d_kv": 16,
        "d_ff": 64, "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu",
        "is_gated_act": True, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "is_encoder_decoder": True,
        "pad_token_id": 0, "eos_token_id": 1},
    "vae": VAE_21 | {"base_dim": 8, "num_res_blocks": 1},
    "dit": {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 4,
        "attention_head_dim": 24, "in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 256,
        "ffn_dim": 192, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None},
}
IMAGE_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 224, "patch_size": 14,
    "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": 32}
TINY_VAE_22 = VAE_22 | {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format Wan with random weights, of the form of Wan 2.1's 1.3B, text to video (1.4 million).

    Raises: OutputError when ``folder`` exists and is not empty.
    """
    _write(folder, seed)


def write_tiny_i2v(folder: Path, seed: int = 0) -> None:
    """One of the form of Wan2.1-I2V-14B: image to video, with tokens of the image. Raises: as `write_tiny`."""
    width = CONFIGS["dit"]["num_attention_heads"] * CONFIGS["dit"]["attention_head_dim"]
    dit = {"in_channels": 36, "image_dim": IMAGE_ENCODER["hidden_size"], "added_kv_proj_dim": width}
    _write(folder, seed, dit, {"image_encoder": IMAGE_ENCODER}, class_name="WanImageToVideoPipeline")


def write_tiny_a14b(folder: Path, seed: int = 0) -> None:
    """One of the form of Wan2.2-T2V-A14B: two experts. Raises: as `write_tiny`."""
    _write(folder, seed, {}, {"dit2": CONFIGS["dit"]}, index={"boundary_ratio": T2V_BOUNDARY})


def write_tiny_i2v_a14b(folder: Path, seed: int = 0) -> None:
    """One of the form of Wan2.2-I2V-A14B. Raises: as `write_tiny`."""
    dit = {"in_channels": 36}
    _write(folder, seed, dit, {"dit2": CONFIGS["dit"] | dit}, IMAGE_EXPERTS.shift, "WanImageToVideoPipeline",
           {"boundary_ratio": 0.9})


def write_tiny_ti2v(folder: Path, seed: int = 0) -> None:
    """One of the form of Wan2.2-TI2V-5B: a film is completed from its first frame. Raises: as `write_tiny`."""
    dit = {"in_channels": 48, "out_channels": 48}
    _write(folder, seed, dit, {"vae": TINY_VAE_22}, index={"expand_timesteps": True})


def _write(folder: Path, seed: int, dit: dict[str, Any] | None = None, further: dict[str, Any] | None = None,
           shift: float = TEXT.shift, class_name: str = "WanPipeline", index: dict[str, Any] | None = None) -> None:
    configs = CONFIGS | {"dit": CONFIGS["dit"] | (dit or {})} | (further or {})
    scheduler = {"_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.35.2", "num_train_timesteps": 1000,
                 "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift,
                 "solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}
    write_model(folder, class_name, list(_made_of(configs)), configs, seed, scheduler, index=index)


def _made_of(configs: dict[str, Any]) -> list[Component]:
    """The components of such a model. The tokenizer is T5's, because UMT5's does not ship with the package."""
    return [replace(c, default_folder=T5_TOKENIZER) if c.is_tokenizer else c for c in COMPONENTS
            if c.is_tokenizer or c.name in configs]
