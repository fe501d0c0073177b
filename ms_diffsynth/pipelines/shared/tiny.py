"""Tiny models with random weights in the real checkpoint format, for tests and first runs."""
from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from ms_diffsynth.draws import Draws
from ms_diffsynth.formats.weights import save_sharded
from ms_diffsynth.models import SCHEDULER_FILE, Component
from ms_diffsynth.nn.names import torch_shapes
from ms_diffsynth.storage.files import stage_folder


def write_model(folder: Path, class_name: str, components: Sequence[Component], configs: dict[str, dict[str, Any]],
                seed: int = 0, scheduler: dict[str, Any] | None = None, parts: Sequence[Component] = (),
                index: dict[str, Any] | None = None) -> None:
    """Write a diffusers-format model: a folder a component, scheduler/ and model_index.json.

    Args:
        class_name: of the pipeline, as diffusers calls it.
        configs: config.json of every component that has weights; the others are tokenizers, copied.
        scheduler: scheduler_config.json; None writes none.
        parts: what the files of a component hold besides; see `Component.part_of`.
        index: further entries of model_index.json.

    Raises: OutputError when ``folder`` exists and is not empty.
    """
    index = {"_class_name": class_name, "_diffusers_version": "0.35.2", **(index or {})}
    with stage_folder(Path(folder)) as stage:
        for component in components:
            target = Path(stage) / component.folder
            if component.name not in configs:
                shutil.copytree(component.default_folder, target)
                settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
                index[component.folder] = ["transformers", settings["tokenizer_class"]]
                continue
            config = configs[component.name]
            is_encoder = "architectures" in config
            weights = random_weights(component.build(config), Draws(seed), component.name)
            for part in (part for part in parts if part.part_of == component.name):
                weights |= random_weights(part.build(config), Draws(seed), part.name)
            save_sharded(target, weights, stem="model" if is_encoder else "diffusion_pytorch_model", config=config)
            index[component.folder] = ["transformers" if is_encoder else "diffusers", component.class_name]
        if scheduler is not None:
            index["scheduler"] = ["diffusers", scheduler["_class_name"]]
            (Path(stage) / "scheduler").mkdir()
            (Path(stage) / "scheduler" / SCHEDULER_FILE).write_text(json.dumps(scheduler, indent=2) + "\n", "utf-8")
        (Path(stage) / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def random_weights(cell: nn.Cell, draws: Draws, stream: str) -> dict[str, np.ndarray]:
    """Weights for every parameter: normal with variance 1 / fan-in, ones for norms, zeros for biases and means."""
    weights = {}
    for k, (name, shape) in enumerate(torch_shapes(cell).items()):
        if name.endswith(("bias", "running_mean")):
            weights[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
        else:
            values = draws.normal(stream, np.array([k]), shape)[0]
            weights[name] = (values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return weights
