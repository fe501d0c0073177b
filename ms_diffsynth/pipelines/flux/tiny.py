"""A FLUX.1 of the real architecture, small enough for a laptop, with random weights: for tests and first runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_diffsynth.diffusion.schedule import FLUX_DEV
from ms_diffsynth.pipelines.flux.pipeline import COMPONENTS, CONTROLNET, FluxImagePipeline
from ms_diffsynth.pipelines.flux.published import CONTROL, FILL
from ms_diffsynth.pipelines.shared.tiny import write_model

CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder_1": {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": 32},
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 48, "d_kv": 16,
        "d_ff": 96, "num_layers": 2, "num_heads": 3, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True,
        "dropout_rate": 0.1, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "vae": {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 8,
        "sample_size": 64, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
        "use_post_quant_conv": False},
    "dit": {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": None,
        "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4,
        "joint_attention_dim": 48, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": [8, 12, 12]},
}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format FLUX.1 with random weights (a few million parameters) into ``folder``.

    Raises: OutputError when the folder exists and is not empty.
    """
    write_model(folder, "FluxPipeline", COMPONENTS, CONFIGS, seed, FLUX_DEV.to_config())


def write_tiny_controlnet(folder: Path, seed: int = 0) -> None:
    """The same with a ControlNet that has learned something random. Raises: as `write_tiny`."""
    _write(folder, seed, "FluxControlNetPipeline", CONFIGS | {"controlnet": _controlnet()})


def write_tiny_union(folder: Path, seed: int = 0) -> None:
    """The same with a union of four ControlNets. Raises: as `write_tiny`."""
    _write(folder, seed, "FluxControlNetPipeline", CONFIGS | {"controlnet": _controlnet() | {"num_mode": 4}})


def write_tiny_fill(folder: Path, seed: int = 0) -> None:
    """A FLUX.1-Fill. Raises: as `write_tiny`."""
    _write(folder, seed, "FluxFillPipeline", CONFIGS | {"dit": CONFIGS["dit"] | FILL})


def write_tiny_canny(folder: Path, seed: int = 0) -> None:
    """A FLUX.1-Canny or -Depth. Raises: as `write_tiny`."""
    _write(folder, seed, "FluxControlPipeline", CONFIGS | {"dit": CONFIGS["dit"] | CONTROL})


def _controlnet() -> dict[str, Any]:
    dit = {name: CONFIGS["dit"][name] for name in FluxImagePipeline.controlnet_settings}
    return {"_class_name": CONTROLNET.class_name, **dit, "num_layers": 1, "num_single_layers": 2}


def _write(folder: Path, seed: int, class_name: str, configs: dict[str, Any]) -> None:
    components = [c for c in (*COMPONENTS, CONTROLNET) if c.is_tokenizer or c.name in configs]
    write_model(folder, class_name, components, configs, seed, FLUX_DEV.to_config())
