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
from ms_diffsynth.formats.originals import in_one_file, in_original_names, in_our_names, models_of
from ms_diffsynth.formats.weights import load_state_dict, open_checkpoint, save_sharded, save_state_dict, serialize
from ms_diffsynth.registry import interchange

ORIGINALS = Path(__file__).parent / "originals"
DIGESTS = json.loads((ORIGINALS / "digests.json").read_text())


def digest(array):
    return [list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()[:16]]


@pytest.mark.parametrize("name, family, model", [("flux", "flux", "dit"), ("flux2", "flux2", "dit"),
                                                 ("vae", "flux", "vae"), ("vae", "sd3", "vae"), ("sd3", "sd3", "dit"),
                                                 ("z_image", "z_image", "dit"), ("film_vae", "qwen_image", "vae"),
                                                 ("film_vae", "wan", "vae"), ("film22_vae", "wan", "vae"),
                                                 ("qwen_text", "qwen_image", "text_encoder")])
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
    ({"img_in.weight": np.ones((3, 2), np.uint8), "img_in.weight_scale": np.ones(3, ml_dtypes.float8_e4m3fn)},
     r"img_in\.weight in .* is uint8 with factors, as files of 4 bits"),
])
def test_what_makes_no_sense_is_refused(tmp_path, tensors, text):
    save_state_dict(tmp_path / "f.safetensors", tensors)
    with pytest.raises(WeightError, match=text):
        in_our_names(open_checkpoint(tmp_path / "f.safetensors"), interchange("flux").models["dit"])


@pytest.mark.parametrize("name, family, model", [("flux", "flux", "dit"), ("flux2", "flux2", "dit"),
                                                 ("vae", "flux", "vae"), ("sd3", "sd3", "dit"),
                                                 ("film_vae", "qwen_image", "vae"),
                                                 ("film22_vae", "wan", "vae")])
def test_there_and_back_every_tensor_has_its_bits(tmp_path, name, family, model):
    table = interchange(family)
    file = ORIGINALS / f"{name}.safetensors"
    ours = in_our_names(open_checkpoint(file), table.models[model])
    save_sharded(tmp_path / "folder", ours, max_shard_bytes=2000)
    assert len(list((tmp_path / "folder").glob("*-of-*.safetensors"))) > 2
    back = in_one_file({model: in_our_names(open_checkpoint(tmp_path / "folder"), table.models[model])}, table)
    save_state_dict(tmp_path / "back.safetensors", back)
    before, after = load_state_dict(file), load_state_dict(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == array.tobytes() and before[key].shape == array.shape
               for key, array in after.items())
    assert {key: digest(array) for key, array in load_state_dict(tmp_path / "folder").items()} == DIGESTS[name]


def test_a_whole_pipeline_is_divided_by_beginnings():
    vae, dit = (open_checkpoint(ORIGINALS / f"{name}.safetensors") for name in ("vae", "sd3"))
    entries = dit.entries | {f"first_stage_model.{name}": entry for name, entry in vae.entries.items()}
    entries |= {f"text_encoders.clip_l.{name}": vae.entries["encoder.conv_in.bias"] for name in (
        "transformer.text_model.final_layer_norm.bias", "logit_scale", "other")}
    found = models_of(vae.with_entries(entries), interchange("sd3"))
    assert found == {"dit": list(dit.entries), "vae": [f"first_stage_model.{name}" for name in vae.entries],
                     "text_encoder_1": ["text_encoders.clip_l.transformer.text_model.final_layer_norm.bias"],
                     "": ["text_encoders.clip_l.other"]}
    assert models_of(dit, interchange("sd3")) == models_of(vae, interchange("sd3")) == {}


@pytest.mark.fault
@pytest.mark.parametrize("change, text", [
    (lambda e: e.pop("transformer_blocks.0.attn.to_k.weight"), r"to_q\.weight without .*\.attn\.to_k"),
    (lambda e: e.update({"odd.weight": e["proj_out.weight"]}), r"1 tensors have no place .*: odd\.weight"),
    (lambda e: e.update({"transformer_blocks.0.attn.to_k.weight": e["proj_out.bias"]}), "expected one dtype and one w"),
])
def test_what_has_no_place_among_the_publishers_names_is_refused(change, text):
    model = interchange("flux").models["dit"]
    ours = in_our_names(open_checkpoint(ORIGINALS / "flux.safetensors"), model)
    change(entries := dict(ours.entries))
    with pytest.raises(WeightError, match=text):
        in_original_names(ours.with_entries(entries), model)


def test_a_file_of_24_gb_is_read_and_written_tensor_by_tensor(tmp_path):
    """A sparse file with FLUX.1-dev's single blocks: what is in memory is one tensor and one member of it."""
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
    model = interchange("flux").models["dit"]
    ours = in_our_names(open_checkpoint(tmp_path / "f.safetensors"), model)
    assert len(ours) == 4 * 180
    member, tensor = 2 * 12288 * 3072, 2 * 21504 * 3072  # bytes
    for checkpoint, most in ((ours, member), (in_original_names(ours, model), tensor + member)):
        stream = serialize(checkpoint)
        assert stream.nbytes > start
        pieces = stream.pieces()
        tracemalloc.start()
        for _ in range(6):
            next(pieces)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.1 * most  # a piece is let go of when the next one is there
