"""A UNet of the real architecture for images of 32 pixels, with random weights: for tests and first runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_diffsynth.draws import Draws
from ms_diffsynth.nn.names import assign
from ms_diffsynth.pipelines.ddpm_unet.pipeline import UnconditionalImagePipeline, build_unet
from ms_diffsynth.pipelines.shared.tiny import random_weights

CONFIG: dict[str, Any] = {
    "sample_size": 32, "layers_per_block": 1, "block_out_channels": [16, 32], "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format DDPM with random weights (0.2 million parameters) into ``folder``.

    Raises: OutputError when the folder exists and is not empty.
    """
    unet = build_unet(CONFIG)
    assign(unet, random_weights(unet, Draws(seed), "unet").items())
    UnconditionalImagePipeline({"unet": unet}).save_pretrained(folder)
