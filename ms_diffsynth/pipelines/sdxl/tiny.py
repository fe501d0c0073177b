"""An SDXL of the real architecture, small enough for a laptop, with random weights: for tests and first runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_diffsynth.pipelines.sd3.tiny import CONFIGS as SD3
from ms_diffsynth.pipelines.sdxl.pipeline import COMPONENTS
from ms_diffsynth.pipelines.sdxl.published import SCHEDULER, UNET
from ms_diffsynth.pipelines.shared.tiny import write_model

CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder_1": SD3["text_encoder_1"] | {"architectures": ["CLIPTextModel"], "num_hidden_layers": 3},
    "text_encoder_2": SD3["text_encoder_2"],
    "vae": SD3["vae"] | {"latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None, "use_quant_conv": True,
                         "use_post_quant_conv": True, "force_upcast": True},
    "unet": UNET | {"sample_size": 16, "block_out_channels": [16, 32, 32], "norm_num_groups": 8,
                    "transformer_layers_per_block": [1, 1, 2], "attention_head_dim": [1, 2, 2],
                    "cross_attention_dim": 40, "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 72},
}


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a diffusers-format SDXL with random weights (3 million, most of them the embeddings of the vocabulary).

    Raises: OutputError when ``folder`` exists and is not empty.
    """
    write_model(folder, "StableDiffusionXLPipeline", COMPONENTS, CONFIGS, seed, SCHEDULER)
