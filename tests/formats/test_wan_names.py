"""LoRAs of Wan by the names of ComfyUI, DiffSynth-Studio, musubi-tuner and diffusers: equal changes of equal layers.

Sources of the names: docs/families/wan.md.
"""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.formats.adapters import LORA, READ
from ms_diffsynth.formats.interchange import ORIGINAL
from ms_diffsynth.formats.lora import AdapterFile, load_adapters, models_in, save_adapters
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.registry import interchange

LAYERS = {  # diffusers' -> the publisher's
    **{f"blocks.0.attn1.{ours}": f"blocks.0.self_attn.{theirs}"
       for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))},
    **{f"blocks.0.attn2.{ours}": f"blocks.0.cross_attn.{theirs}"
       for ours, theirs in (("to_q", "q"), ("to_out.0", "o"), ("add_k_proj", "k_img"), ("add_v_proj", "v_img"))},
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0", "blocks.11.ffn.net.2": "blocks.11.ffn.2",
}
A, B = "lora_A.weight", "lora_B.weight"


def pair(k):
    rng = np.random.default_rng(k)
    return rng.standard_normal((2, 4)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)


@pytest.mark.parametrize("begin, is_original, is_flat, down, up, alpha", [
    ("transformer.", False, False, A, B, None), ("diffusion_model.", True, False, A, B, None),
    ("diffusion_model.", True, False, "lora_down.weight", "lora_up.weight", 1.0),
    ("", True, False, "lora_A.default.weight", "lora_B.default.weight", None),
    ("lora_unet_", True, True, "lora_down.weight", "lora_up.weight", 1.0)])
def test_the_names_of_others_are_read(tmp_path, begin, is_original, is_flat, down, up, alpha):
    tensors = {}
    for k, (ours, theirs) in enumerate(LAYERS.items()):
        name = theirs if is_original else ours
        stem = begin + (name.replace(".", "_") if is_flat else name)
        tensors |= dict(zip((f"{stem}.{down}", f"{stem}.{up}"), pair(k)))
        tensors |= {} if alpha is None else {f"{stem}.alpha": np.array(alpha, np.float32)}
    save_state_dict(tmp_path / "f.safetensors", tensors)
    table = interchange("wan")
    assert list(models_in(tmp_path / "f.safetensors", table)) == ["dit"]
    file = load_adapters(tmp_path / "f.safetensors", {"dit": list(LAYERS)}, READ, table)["dit"]
    scale = 1.0 if alpha is None else alpha / 2
    for k, (name, parts) in enumerate(file.with_scale().items()):
        a, b = pair(list(LAYERS).index(name))
        np.testing.assert_allclose(parts[B] @ parts[A], scale * b @ a, rtol=1e-6, err_msg=f"{k} {name}")
    assert set(file.modules) == set(LAYERS)


def test_what_is_saved_has_the_publishers_names(tmp_path):
    table = interchange("wan")
    modules = {name: dict(zip((A, B), pair(k))) for k, name in enumerate(LAYERS)}
    file = AdapterFile(modules, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, LORA))
    save_adapters(tmp_path / "f.safetensors", {"dit": file}, table, table.default)
    assert {name.rpartition(".lora_")[0] for name in load_state_dict(tmp_path / "f.safetensors")} == {
        f"diffusion_model.{theirs}" for theirs in LAYERS.values()}


def test_tensors_beside_the_layers_have_names_too():
    model = interchange("wan").models["dit"]
    assert model.tensor("blocks.12.scale_shift_table", is_ours=True) == "blocks.12.modulation"
    assert model.tensor("head.modulation", is_ours=False) == "scale_shift_table"
    assert model.tensor("blocks.x.modulation", is_ours=False) is None
    assert model.place("blocks.3.norm2", ORIGINAL)[0] == "blocks.3.norm3"
