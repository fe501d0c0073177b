"""LoRA files as this package saves them, read by mindone's own loader: every layer, with its scale."""
from __future__ import annotations

import json

import numpy as np
import pytest
from device import DEVICE

from ms_diffsynth import runtime
from ms_diffsynth.formats.adapters import LORA, A, B
from ms_diffsynth.formats.lora import AdapterFile, save_adapters
from ms_diffsynth.formats.weights import open_checkpoint
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.registry import family, interchange

LOADERS = {"flux": "Flux", "flux2": "Flux2", "qwen_image": "QwenImage", "sd3": "SD3", "sdxl": "StableDiffusionXL",
           "wan": "Wan"}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.few(2)
def test_mindone_reads_every_layer(name, tiny_model, tmp_path):
    runtime.configure("pynative", DEVICE)
    with quiet_imports():
        from mindone import diffusers
        from mindone.diffusers import loaders
        from mindone.peft.tuners.lora.layer import LoraLayer

    cls, table = family(name).pipeline, interchange(name)
    kind = "unet" if name == "sdxl" else "transformer"
    folder = tiny_model(name) / kind
    random = np.random.default_rng(0)
    shapes = {n.removesuffix(".weight"): s for n, s in open_checkpoint(folder).shapes.items() if n.endswith(".weight")}
    modules = {m: {A: random.standard_normal((4, s[1])).astype(np.float32),
                   B: random.standard_normal((s[0], 4)).astype(np.float32)}
               for m, s in shapes.items() if any(m == t or m.endswith(f".{t}") for t in cls.lora_target_modules)}
    file = AdapterFile(modules, dict.fromkeys(modules, 0.5), dict.fromkeys(modules, LORA))
    save_adapters(tmp_path / "l.safetensors", {table.network: file}, table, table.default)

    mixin = getattr(loaders.lora_pipeline, f"{LOADERS[name]}LoraLoaderMixin")
    class_name = json.loads((folder / "config.json").read_text())["_class_name"]
    network = getattr(diffusers, class_name).from_pretrained(folder)
    told = {"unet_config": network.config} if kind == "unet" else {}  # what mindone's pipeline tells
    state, *alphas, metadata = mixin.lora_state_dict(str(tmp_path), weight_name="l.safetensors",
                                                     return_lora_metadata=True, **told)
    how = {"network_alphas": alphas[0] if alphas else None} if name in ("flux", "sdxl") else {}
    getattr(mixin, f"load_lora_into_{kind}")(state, **{kind: network}, metadata=metadata, **how)
    found = {n: cell for n, cell in network.cells_and_names() if isinstance(cell, LoraLayer)}
    assert found.keys() == modules.keys()
    for module, cell in found.items():
        own = next(iter(cell.lora_A))
        up, down = (layers[own].weight.asnumpy().astype(np.float64) for layers in (cell.lora_B, cell.lora_A))
        expected = 0.5 * modules[module][B].astype(np.float64) @ modules[module][A].astype(np.float64)
        np.testing.assert_allclose(cell.scaling[own] * up @ down, expected, atol=1e-6, err_msg=module)
