"""Load LoRAs that write.py wrote by mindone's own loader: the change of every weight.

    python tests/formats/elsewhere/read_by_mindone.py OUT [MODEL ...]

Prints the largest difference for each layout. That mindone reads the layout that is saved by default is a test:
tests/pipelines/test_mindone_loader.py.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ms_diffsynth import runtime
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

with quiet_imports():
    from mindone import diffusers
    from mindone.diffusers import loaders
    from mindone.peft.tuners.lora.layer import LoraLayer

MIXINS = {"FluxTransformer2DModel": "Flux", "Flux2Transformer2DModel": "Flux2", "SD3Transformer2DModel": "SD3",
          "QwenImageTransformer2DModel": "QwenImage", "UNet2DConditionModel": "StableDiffusionXL",
          "WanTransformer3DModel": "Wan"}


def changes(folder: Path, file: Path, class_name: str, expected: dict[str, np.ndarray]) -> str:
    """What loading a file changes."""
    mixin = getattr(loaders.lora_pipeline, f"{MIXINS[class_name]}LoraLoaderMixin")
    network = getattr(diffusers, class_name).from_pretrained(folder)
    kind = "unet" if class_name.startswith("UNet") else "transformer"
    try:
        told = {"unet_config": network.config} if kind == "unet" else {}  # what the pipeline tells
        state, *alphas, metadata = mixin.lora_state_dict(str(file.parent), weight_name=file.name,
                                                         return_lora_metadata=True, **told)
        how = {"network_alphas": alphas[0] if alphas else None} if MIXINS[class_name] in ("Flux", "StableDiffusionXL") \
            else {}
        getattr(mixin, f"load_lora_into_{kind}")(state, **{kind: network}, metadata=metadata, **how)
    except Exception as error:
        return f"{type(error).__name__} {str(error)[:90]}"
    found = {name: cell for name, cell in network.cells_and_names() if isinstance(cell, LoraLayer)}
    if not found:
        return "none"
    worst = 0.0
    for name in found.keys() | expected.keys():
        change = np.zeros(())
        if name in found:
            cell, own = found[name], next(iter(found[name].lora_A))
            up, down = (layers[own].weight.asnumpy().astype(np.float64) for layers in (cell.lora_B, cell.lora_A))
            change = cell.scaling[own] * up @ down
        worst = max(worst, float(np.abs(change - expected.get(name, 0)).max()))
    return f"{worst:.0e} ({len(found.keys() & expected.keys())} of {len(expected)} layers)"


if __name__ == "__main__":
    runtime.configure("pynative", "CPU")
    out = Path(sys.argv[1])
    for model in sys.argv[2:] or sorted(path.name for path in out.iterdir()):
        folder = next(path for path in (out / model / "model/transformer", out / model / "model/unet") if path.is_dir())
        class_name = json.loads((folder / "config.json").read_text())["_class_name"]
        expected = load_state_dict(out / model / "expected.safetensors")
        for file in sorted((out / model).glob("lora-*.safetensors")):
            told = changes(folder, file, class_name, expected) if class_name in MIXINS else "no network"
            print(f"{model:20} {file.stem:16} {told}", flush=True)
