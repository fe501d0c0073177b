"""A Z-Image of the real architecture, small enough for a laptop, with random weights: for tests and first runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_diffsynth.pipelines.flux.tiny import CONFIGS as FLUX
from ms_diffsynth.pipelines.flux2.tiny import CONFIGS as FLUX2
from ms_diffsynth.pipelines.shared.tiny import write_model
from ms_diffsynth.pipelines.z_image.pipeline import BASE, COMPONENTS

CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": FLUX2["text_encoder"] | {"num_hidden_layers": 3},
    "vae": FLUX["vae"],
    "dit": {
        "_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16,
        "dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 1e-5,
        "qk_norm": True, "cap_feat_dim": 32, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 12, 12],
        "axes_lens": [1536, 512, 512]},
}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format Z-Image with random weights (6 million, most of them the vocabulary's embedding).

    Raises: OutputError when ``folder`` exists and is not empty.
    """
    write_model(folder, "ZImagePipeline", COMPONENTS, CONFIGS, seed, BASE.to_config())
