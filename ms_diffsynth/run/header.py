"""What the header of a LoRA file says of its training, by the keys that other programs show (kohya's, modelspec's)."""
from __future__ import annotations

import json
import math
import re
from pathlib import Path

from ms_diffsynth.config import TrainConfig
from ms_diffsynth.formats.interchange import Table
from ms_diffsynth.formats.lora import TRAINED_MODELS
from ms_diffsynth.hub.download import parse_model_id_with_origin_paths
from ms_diffsynth.run.pipeline import most_pixels


def file_header(config: TrainConfig, table: Table, images: int) -> dict[str, str]:
    """All strings; no path, no caption, and no date: the same run writes the same bytes.

    ``ss_network_module`` is not there: it would promise kohya's layout.

    Args:
        images: how many are trained on.

    Source: sd-scripts, library/sai_model_spec.py and train_network.py; modelspec 1.0.1.
    """
    header = {"ms_diffsynth.family": config.model.family}
    if config.model.trainable_models or not config.model.lora_base_model:
        return header
    model, data, optimizer, run = config.model, config.data, config.optimizer, config.run
    side = math.isqrt(most_pixels(config))
    width, height = (data.width or side), (data.height or side)
    title = Path(run.output_path).resolve().name
    ids = [c.model_id for c in parse_model_id_with_origin_paths(model.model_id_with_origin_paths or "")
           ] if model.model_id_with_origin_paths else []
    known = {
        TRAINED_MODELS: model.lora_base_model,
        "ms_diffsynth.base_model": ids[-1] if ids else None,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.title": title, "modelspec.implementation": "diffusers",
        "modelspec.architecture": table.architecture and f"{table.architecture}/lora",
        "modelspec.resolution": f"{width}x{height}", "modelspec.trigger_phrase": data.instance_prompt,
        "ss_v2": "False", "ss_base_model_version": table.base_version, "ss_sd_model_name": ids[-1] if ids else None,
        "ss_output_name": title, "ss_network_dim": str(model.lora_rank),
        "ss_network_alpha": str(model.lora_rank),  # folded: what the file holds
        "ss_network_args": json.dumps({"adapter": model.adapter, "trained_alpha": model.lora_alpha or model.lora_rank}),
        "ss_learning_rate": str(optimizer.learning_rate), "ss_optimizer": optimizer.optimizer,
        "ss_lr_scheduler": optimizer.lr_scheduler, "ss_lr_warmup_steps": str(optimizer.lr_warmup_steps),
        "ss_seed": str(run.seed), "ss_num_train_images": str(images), "ss_batch_size_per_device": str(run.batch_size),
        "ss_gradient_accumulation_steps": str(optimizer.gradient_accumulation_steps),
        "ss_resolution": f"({width}, {height})",
    }
    return header | {key: re.sub(r"\s+", " ", value) for key, value in known.items() if value}
