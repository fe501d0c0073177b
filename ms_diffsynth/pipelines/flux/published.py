"""FLUX.1 as it is published: the settings of its transformer and VAE, without the weights.

Source: black-forest-labs/FLUX.1-dev and FLUX.1-schnell on the Hugging Face hub, ``transformer/config.json`` and
``vae/config.json``; the transformer's are also the defaults of diffusers 0.42.1, FluxTransformer2DModel, but for
``guidance_embeds``. DiffSynth-Studio knows FLUX.1-dev's files by the hash of their names and shapes, and a network of
these settings has that hash (tests/golden/published.json).
"""
from __future__ import annotations

from typing import Any

from ms_diffsynth.pipelines.shared.autoencoder_kl import FLUX_VAE
from ms_diffsynth.pipelines.shared.text import CLIP_L, T5_XXL

_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19,
    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56]}

# FLUX.1-Fill-dev: 16 channels of the picture without its hole and 64 of the mask beside the 16 that are noisy, for each
# of the four latent pixels of a token; FLUX.1-Canny-dev and -Depth-dev: 16 of the control image
FILL, CONTROL = {"in_channels": 384, "out_channels": 64}, {"in_channels": 128, "out_channels": 64}

_OTHERS = {"vae": FLUX_VAE, "text_encoder_1": CLIP_L, "text_encoder_2": T5_XXL}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "FLUX.1-dev": {"dit": _DEV, **_OTHERS},
    "FLUX.1-schnell": {"dit": _DEV | {"guidance_embeds": False}, **_OTHERS},
    "FLUX.1-Kontext-dev": {"dit": _DEV, **_OTHERS},  # dev's networks, with other weights
    "FLUX.1-Fill-dev": {"dit": _DEV | FILL, **_OTHERS},
    "FLUX.1-Canny-dev": {"dit": _DEV | CONTROL, **_OTHERS},
}
# Source: InstantX/FLUX.1-dev-Controlnet-Union-alpha and jasperai/Flux.1-dev-Controlnet-Upscaler, ``config.json``
_CONTROLNET: dict[str, Any] = {"_class_name": "FluxControlNetModel", **{
    name: _DEV[name] for name in ("patch_size", "in_channels", "attention_head_dim", "num_attention_heads",
                                  "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope")}}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "FLUX.1-dev-Controlnet-Union-alpha": _CONTROLNET | {"num_layers": 5, "num_single_layers": 10, "num_mode": 10},
    "Flux.1-dev-Controlnet-Upscaler": _CONTROLNET | {"num_layers": 5, "num_single_layers": 0},
}
REPOSITORIES = {f"black-forest-labs/{name}": name for name in PUBLISHED} | {
    "black-forest-labs/FLUX.1-Depth-dev": "FLUX.1-Canny-dev"}


def prepared_shapes(configs: dict[str, dict[str, Any]], latent: tuple[int, int, int],
                    text_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the prepared slots of a row, for latents [C, h, w] and a prompt of ``text_tokens``."""
    dit = configs["dit"]
    return {"moments": (2 * latent[0], *latent[1:]), "prompt_embeds": (text_tokens, dit["joint_attention_dim"]),
            "pooled_prompt_embeds": (dit["pooled_projection_dim"],)}
