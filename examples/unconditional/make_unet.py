"""Write an untrained UNet for images of 32 pixels, 687,347 parameters, from which smileys.yaml trains.

    python examples/unconditional/make_unet.py models/ddpm-smileys
"""
from __future__ import annotations

import sys

from ms_diffsynth import Draws, UnconditionalImagePipeline, runtime
from ms_diffsynth.diffusion.ddpm import NoiseSchedule
from ms_diffsynth.nn.names import assign
from ms_diffsynth.pipelines.ddpm_unet.pipeline import build_unet
from ms_diffsynth.pipelines.shared.tiny import random_weights

CONFIG = {  # every field is one of diffusers' UNet2DModel
    "sample_size": 32,
    "layers_per_block": 1,
    "block_out_channels": [16, 32, 64],
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}

# Cosine betas leave small images readable for longer; the velocity is as hard to learn at every one of them.
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}

if __name__ == "__main__":
    runtime.configure("graph")
    unet = build_unet(CONFIG)
    assign(unet, random_weights(unet, Draws(0), "unet").items())
    UnconditionalImagePipeline({"unet": unet}, noise_schedule=NoiseSchedule(**SCHEDULE)).save_pretrained(sys.argv[1])
