"""A FLUX.2 klein of the real architecture, small enough for a laptop, with random weights: for tests and first runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_diffsynth.diffusion.schedule import FLUX_DEV
from ms_diffsynth.pipelines.flux2.pipeline import COMPONENTS
from ms_diffsynth.pipelines.shared.tiny import write_model

CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "attention_bias": False, "use_sliding_window": False},
    "vae": {
        "_class_name": "AutoencoderKLFlux2", "in_channels": 3, "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "act_fn": "silu", "latent_channels": 32,
        "norm_num_groups": 8, "sample_size": 64, "use_quant_conv": True, "use_post_quant_conv": True,
        "mid_block_add_attention": True, "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "patch_size": [2, 2]},
    "dit": {
        "_class_name": "Flux2Transformer2DModel", "patch_size": 1, "in_channels": 128, "out_channels": None,
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 3,
        "joint_attention_dim": 96, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
        "axes_dims_rope": [8, 8, 8, 8], "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": False},
}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format FLUX.2 klein with random weights (7 million, most of them the vocabulary's embedding).

    Raises: OutputError when ``folder`` exists and is not empty.
    """
    write_model(folder, "Flux2KleinPipeline", COMPONENTS, CONFIGS, seed, FLUX_DEV.to_config())
