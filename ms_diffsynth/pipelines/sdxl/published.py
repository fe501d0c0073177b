"""Stable Diffusion XL as it is published: the settings of its networks and schedule, without the weights.

Source: the config.json and scheduler_config.json files of stabilityai/stable-diffusion-xl-base-1.0 on the Hugging Face
hub, as public code that builds these networks quotes them.
"""
from __future__ import annotations

from typing import Any

from ms_diffsynth.diffusion.ddpm import NoiseSchedule
from ms_diffsynth.pipelines.shared.text import CLIP_G, CLIP_L, CLIP_TOKENS

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-5,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.13025,
    "force_upcast": True}
ENCODER_2 = CLIP_G | {"architectures": ["CLIPTextModelWithProjection"]}
# its class is EulerDiscreteScheduler; without steps of sampling it is DDPM's schedule with these settings
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False}
SCHEDULE = NoiseSchedule.from_config(SCHEDULER)

SIZES = 6  # numbers that tell the network how an image was cut out
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "SDXL-base": {"unet": UNET, "vae": VAE, "text_encoder_1": CLIP_L, "text_encoder_2": ENCODER_2}}
REPOSITORIES = {"stabilityai/stable-diffusion-xl-base-1.0": "SDXL-base"}


def prepared_shapes(configs: dict[str, dict[str, Any]], latent: tuple[int, int, int],
                    text_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the prepared slots of a row, for latents [C, h, w]; prompts have 77 tokens, whatever they say."""
    unet = configs["unet"]
    pooled = unet["projection_class_embeddings_input_dim"] - SIZES * unet["addition_time_embed_dim"]
    return {"moments": (2 * latent[0], *latent[1:]), "time_ids": (SIZES,),
            "prompt_embeds": (CLIP_TOKENS, unet["cross_attention_dim"]),
            "pooled_prompt_embeds": (pooled,)}
