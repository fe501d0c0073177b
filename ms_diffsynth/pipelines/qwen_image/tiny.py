"""A Qwen-Image of the real architecture, small enough for a laptop, with random weights: for tests and first runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_diffsynth.pipelines.qwen_image.pipeline import (
    COMPONENTS,
    CONTROLNET,
    SCHEDULER,
    VISION_TOWER,
    QwenImagePipeline,
)
from ms_diffsynth.pipelines.shared.tiny import write_model

CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text", "vocab_size": 151936, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "use_sliding_window": False}},
    "vae": {
        "_class_name": "AutoencoderKLQwenImage", "base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
        "latents_mean": [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        "latents_std": [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]},
    "dit": {
        "_class_name": "QwenImageTransformer2DModel", "patch_size": 2, "in_channels": 64, "out_channels": 16,
        "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 3, "joint_attention_dim": 32,
        "guidance_embeds": False, "axes_dims_rope": [8, 12, 12]},
}


VISION = {
    "model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
    "out_hidden_size": 32, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [1], "hidden_act": "silu"}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format Qwen-Image with random weights (6 million, most of them the vocabulary's embedding).

    The text encoder has no vision tower, which text to image never uses.

    Raises: OutputError when ``folder`` exists and is not empty.
    """
    write_model(folder, "QwenImagePipeline", COMPONENTS, CONFIGS, seed, SCHEDULER.to_config())


def write_tiny_edit(folder: Path, seed: int = 0) -> None:
    """The same with a vision tower: a Qwen-Image-Edit, the first one. Raises: as `write_tiny`."""
    _write_edit(folder, seed, "QwenImageEditPipeline", False)


def write_tiny_edit_2509(folder: Path, seed: int = 0) -> None:
    """A Qwen-Image-Edit-2509. Raises: as `write_tiny`."""
    _write_edit(folder, seed, "QwenImageEditPlusPipeline", False)


def write_tiny_edit_2511(folder: Path, seed: int = 0) -> None:
    """A Qwen-Image-Edit-2511. Raises: as `write_tiny`."""
    _write_edit(folder, seed, "QwenImageEditPlusPipeline", True)


def write_tiny_controlnet(folder: Path, seed: int = 0) -> None:
    """A Qwen-Image with a ControlNet that has learned something random. Raises: as `write_tiny`."""
    _write_controlnet(folder, seed, 0)


def write_tiny_inpaint(folder: Path, seed: int = 0) -> None:
    """The same with a ControlNet for inpainting. Raises: as `write_tiny`."""
    _write_controlnet(folder, seed, 4)


def _write_controlnet(folder: Path, seed: int, extra_channels: int) -> None:
    dit = {name: CONFIGS["dit"][name] for name in QwenImagePipeline.controlnet_settings}
    own = {"_class_name": CONTROLNET.class_name, **dit, "num_layers": 1, "extra_condition_channels": extra_channels}
    write_model(folder, f"QwenImageControlNet{'Inpaint' if extra_channels else ''}Pipeline", (*COMPONENTS, CONTROLNET),
                CONFIGS | {"controlnet": own}, seed, SCHEDULER.to_config())


def _write_edit(folder: Path, seed: int, class_name: str, zero_cond_t: bool) -> None:
    configs = CONFIGS | {"text_encoder": CONFIGS["text_encoder"] | {"vision_config": VISION},
                         "dit": CONFIGS["dit"] | {"zero_cond_t": zero_cond_t}}
    write_model(folder, class_name, COMPONENTS, configs, seed, SCHEDULER.to_config(), (VISION_TOWER,))
