"""Checkpoints in their publishers' names: the tensors that diffusers makes of them, bit for bit.

The files and the digests of diffusers' tensors are made by originals/make.py.
"""
from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.originals import in_our_names
from ms_diffsynth.formats.weights import open_checkpoint, save_state_dict
from ms_diffsynth.registry import interchange

ORIGINALS = Path(__file__).parent / "originals"
DIGESTS = json.loads((ORIGINALS / "digests.json").read_text())


def digest(array):
    return [list(array.shape), hashlib.sha256(array.view(np.uint16).tobytes()).hexdigest()[:16]]


@pytest.mark.parametrize("name, family, model", [("flux", "flux", "dit"), ("flux2", "flux2", "dit"),
                                                 ("z_image", "z_image", "dit"),
                                                 ("vae", "flux", "vae"), ("vae", "sd3", "vae")])
def test_the_tensors_are_those_that_diffusers_makes(name, family, model):
    checkpoint = in_our_names(open_checkpoint(ORIGINALS / f"{name}.safetensors"), interchange(family).models[model])
    assert {key: digest(array) for key, array in checkpoint.tensors()} == DIGESTS[name]
    assert {key: list(shape) for key, shape in checkpoint.shapes.items()} == {k: v[0] for k, v in DIGESTS[name].items()}
    again = in_our_names(checkpoint, interchange(family).models[model])  # diffusers' names stay
    assert again.entries == checkpoint.entries


def test_files_with_a_beginning_are_the_same(tmp_path):
    tensors = {f"model.diffusion_model.{k}": v for k, v in open_checkpoint(ORIGINALS / "flux.safetensors").tensors()}
    save_state_dict(tmp_path / "f.safetensors", tensors)
    checkpoint = in_our_names(open_checkpoint(tmp_path / "f.safetensors"), interchange("flux").models["dit"])
    assert {key: digest(array) for key, array in checkpoint.tensors()} == DIGESTS["flux"]


@pytest.mark.parametrize("end, marks", [("scale_weight", {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}),
                                        ("weight_scale", {"img_in.input_scale": np.ones(1, np.float32)})])
def test_weights_of_8_bits_are_multiplied_by_their_factor(tmp_path, end, marks):
    stored = np.linspace(-2, 2, 24, dtype=np.float32).reshape(12, 2).astype(ml_dtypes.float8_e4m3fn)
    save_state_dict(tmp_path / "f.safetensors", {
        "double_blocks.0.img_attn.qkv.weight": stored, f"double_blocks.0.img_attn.qkv.{end}": np.array(0.5, np.float32),
        "img_in.weight": stored, "img_in.bias": np.ones(12, np.float32), **marks})
    found = dict(in_our_names(open_checkpoint(tmp_path / "f.safetensors"),
                              interchange("flux").models["dit"]).tensors())
    attention = "transformer_blocks.0.attn"
    assert found.keys() == {*(f"{attention}.to_{p}.weight" for p in "qkv"), "x_embedder.weight", "x_embedder.bias"}
    np.testing.assert_array_equal(found[f"{attention}.to_k.weight"], 0.5 * stored[4:8].astype(np.float32))
    assert found["x_embedder.weight"].tobytes() == stored.tobytes()  # without a factor: as it is


@pytest.mark.fault
@pytest.mark.parametrize("tensors, text", [
    ({"double_blocks.0.img_attn.qkv.weight": np.ones((10, 2), np.float32)}, r"whose rows are not \(1, 1, 1\) parts"),
    ({"img_in.weight": np.ones((3, 2), ml_dtypes.float8_e4m3fn), "img_in.scale_weight": np.ones(3, np.float32)},
     "expected one factor"),
])
def test_what_makes_no_sense_is_refused(tmp_path, tensors, text):
    save_state_dict(tmp_path / "f.safetensors", tensors)
    with pytest.raises(WeightError, match=text):
        in_our_names(open_checkpoint(tmp_path / "f.safetensors"), interchange("flux").models["dit"])


def test_a_file_of_24_gb_is_read_tensor_by_tensor(tmp_path):
    """A sparse file with FLUX.1-dev's single blocks: what is in memory is one member of one layer."""
    shapes = {f"single_blocks.{k}.linear1.weight": (21504, 3072) for k in range(180)}
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with open(tmp_path / "f.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    assert start > 23e9
    checkpoint = in_our_names(open_checkpoint(tmp_path / "f.safetensors"), interchange("flux").models["dit"])
    assert len(checkpoint) == 4 * 180
    tracemalloc.start()
    for k in range(2):
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
            checkpoint[f"single_transformer_blocks.{k}.{part}.weight"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 12288 * 3072 * 1.1  # bytes of the largest member
