"""A Stable Diffusion 3 of the real architecture, small enough for a laptop, with random weights."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_diffsynth.pipelines.flux.tiny import CONFIGS as FLUX
from ms_diffsynth.pipelines.sd3.pipeline import COMPONENTS, SCHEDULER
from ms_diffsynth.pipelines.shared.tiny import write_model

_CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "vocab_size": 49408,
    "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 77, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder_1": _CLIP | {
        "hidden_size": 16, "num_hidden_layers": 2, "hidden_act": "quick_gelu", "projection_dim": 16},
    "text_encoder_2": _CLIP | {
        "hidden_size": 24, "num_hidden_layers": 3, "hidden_act": "gelu", "projection_dim": 24},
    "text_encoder_3": FLUX["text_encoder_2"],
    "vae": FLUX["vae"] | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "dit": {
        "_class_name": "SD3Transformer2DModel", "sample_size": 16, "patch_size": 2, "in_channels": 16,
        "out_channels": 16, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 3,
        "joint_attention_dim": 48, "caption_projection_dim": 96, "pooled_projection_dim": 40,
        "pos_embed_max_size": 24, "dual_attention_layers": [], "qk_norm": None},
}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format Stable Diffusion 3 with random weights (4 million) into ``folder``.

    Raises: OutputError when the folder exists and is not empty.
    """
    write_model(folder, "StableDiffusion3Pipeline", COMPONENTS, CONFIGS, seed, SCHEDULER.to_config())
