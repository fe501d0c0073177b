"""A pipeline of single files without config.json, in their publishers' names, is the one of diffusers' folders."""
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from device import DEVICE

from ms_diffsynth import ModelConfig, runtime
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.originals import in_one_file, in_our_names
from ms_diffsynth.formats.weights import load_state_dict, open_checkpoint, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import family, interchange

ORIGINALS = Path(__file__).parents[1] / "formats/originals"


@pytest.fixture
def known(tiny_model, monkeypatch):
    """``known(family)``: the family knows its tiny model by names and shapes. Returns: model -> its folder."""
    def make(name):
        folder, cls = tiny_model(name), family(name).pipeline
        monkeypatch.setattr(cls, "components", tuple(
            replace(c, known={"tiny": json.loads((folder / c.folder / "config.json").read_text())})
            if c.known and (folder / c.folder).is_dir() else c for c in cls.components))
        return {c.name: folder / c.folder for c in cls.components if c.known and (folder / c.folder).is_dir()}
    runtime.configure("pynative", DEVICE)
    return make


@pytest.fixture
def single(known, tmp_path):
    """``single(family)``: a file for each model in one folder, by the publisher's names."""
    def write(name):
        table = interchange(name)
        for model, folder in known(name).items():
            checkpoint = open_checkpoint(folder)
            if model == "text_encoder_1" and name == "sd3":  # publishers' files have no projection of CLIP-L
                checkpoint = checkpoint.with_entries({k: v for k, v in checkpoint.entries.items()
                                                      if k != "text_projection.weight"})
            save_state_dict(tmp_path / f"{model}.safetensors", in_one_file({model: checkpoint}, table))
        return [ModelConfig(str(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    return write


def assert_same_models(pipe, expected, models):
    for model in models:
        own, theirs = state_dict(getattr(pipe, model)), state_dict(getattr(expected, model))
        assert own.keys() == theirs.keys()
        for key, array in theirs.items():
            if (model, key) == ("text_encoder_1", "text_projection.weight"):
                array = np.eye(len(array), dtype=array.dtype)
            np.testing.assert_array_equal(own[key], array, err_msg=f"{model} {key}")
        assert pipe.config(model) == expected.config(model)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "sd3", "wan", "z_image"])
@pytest.mark.few(2)
def test_single_files_are_the_models_of_the_folders(name, single, tiny_model, caplog):
    caplog.set_level("INFO")
    files, cls = single(name), family(name).pipeline
    pipe, expected = cls.from_pretrained(files), cls.from_pretrained(str(tiny_model(name)))
    models = [c.name for c in cls.components if c.known and c.name in expected.sources]
    assert set(pipe.sources) == set(models)
    assert "no config.json; by names and shapes it is the dit of tiny" in caplog.text
    assert_same_models(pipe, expected, models)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image"])
@pytest.mark.few(1)
def test_a_whole_pipeline_in_one_file_is_that_of_the_folders(name, known, tiny_model, tmp_path, caplog):
    checkpoints = {model: open_checkpoint(folder) for model, folder in known(name).items()}
    if name == "sd3":
        left = {k: v for k, v in checkpoints["text_encoder_1"].entries.items() if k != "text_projection.weight"}
        checkpoints["text_encoder_1"] = checkpoints["text_encoder_1"].with_entries(left)
    whole = in_one_file(checkpoints, interchange(name))
    assert {key.split(".")[0] for key in whole.entries} == {"model", "text_encoders",
                                                            "first_stage_model" if name == "sd3" else "vae"}
    more = {"text_encoders.clip_l.logit_scale": np.ones((), np.float32), "model_ema.x": np.ones(2, np.float32)}
    save_state_dict(tmp_path / "whole.safetensors", whole.with_arrays(more))
    pipe = family(name).pipeline.from_pretrained(str(tmp_path / "whole.safetensors"))
    assert "1 tensors are of no model that is used here, and left out: model_ema.x" in caplog.text
    assert pipe.sources.keys() == checkpoints.keys()
    assert_same_models(pipe, family(name).pipeline.from_pretrained(str(tiny_model(name))), checkpoints)
    last = "proj_out" if name == "qwen_image" else "final_layer.linear"
    without = whole.with_entries({k: v for k, v in whole.entries.items() if last not in k})
    save_state_dict(tmp_path / "part.safetensors", without)
    pipe = family(name).pipeline.from_pretrained(str(tmp_path / "part.safetensors"))
    with pytest.raises(WeightError, match=r"2 missing: proj_out\.(bias|weight)"):
        pipe.load_models_to_device(["dit"])


def test_a_config_beside_the_publishers_file_is_used(single, tiny_model, tmp_path):
    single("flux")
    for name in ("f.safetensors", "config.json"):
        source = tmp_path / "dit.safetensors" if name[0] == "f" else tiny_model("flux") / "transformer/config.json"
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / name).write_bytes(source.read_bytes())
    cls = family("flux").pipeline
    pipe = cls.from_pretrained(str(tmp_path / "own"))
    assert_same_models(pipe, cls.from_pretrained(str(tiny_model("flux"))), ["dit"])


def test_files_of_no_known_model_are_refused(single, tmp_path):
    single("flux")
    save_state_dict(tmp_path / "odd.safetensors", {"x_embedder.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(WeightError, match=r"config\.json is missing, and the names and shapes in .*odd\.safetensors"):
        family("flux").pipeline.from_pretrained(ModelConfig(str(tmp_path / "odd.safetensors")))


def test_stored_in_8_bits_with_factors_and_without(single, tmp_path, tiny_model):
    files = single("flux")
    tensors = load_state_dict(tmp_path / "dit.safetensors")
    linear = [k for k, v in tensors.items() if v.ndim == 2]
    stored = {k: (tensors[k] * 4).astype(ml_dtypes.float8_e4m3fn) for k in linear}
    factors = {k.replace(".weight", ".scale_weight"): np.array(0.25, np.float32) for k in linear}
    save_state_dict(tmp_path / "dit.safetensors", {**tensors, **stored, **factors})
    pipe = family("flux").pipeline.from_pretrained(files)
    plain = load_state_dict(tiny_model("flux") / "transformer")["transformer_blocks.0.attn.to_q.weight"]
    found = state_dict(pipe.dit)["transformer_blocks.0.attn.to_q.weight"]
    np.testing.assert_array_equal(found, 0.25 * (plain * 4).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.fault
@pytest.mark.parametrize("value, dtype", [(np.nan, np.float32), (np.inf, np.float32), (np.nan, ml_dtypes.bfloat16),
                                          (np.nan, np.float16), (np.nan, ml_dtypes.float8_e4m3fn)])
def test_numbers_that_are_not_finite_are_refused_by_name(single, tmp_path, value, dtype):
    files = single("flux")
    tensors = load_state_dict(tmp_path / "dit.safetensors")
    odd = tensors["double_blocks.0.txt_mlp.0.weight"].astype(dtype)
    odd[3, 2] = value
    save_state_dict(tmp_path / "dit.safetensors", {**tensors, "double_blocks.0.txt_mlp.0.weight": odd})
    pipe = family("flux").pipeline.from_pretrained(files)
    with pytest.raises(WeightError, match=r"dit\.safetensors: transformer_blocks\.0\.ff_context\.net\.0\.proj\.weight "
                                          "holds numbers that are not finite"):
        pipe.load_models_to_device(["dit"])


def write_sparse(file, shapes):
    """Zeros of bfloat16 that take no space."""
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)


def language_model(vocabulary, width, inner, layers):
    found = {"model.embed_tokens.weight": (vocabulary, width)}
    for k in range(layers):
        found |= {f"model.layers.{k}.mlp.{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
        found[f"model.layers.{k}.mlp.down_proj.weight"] = (width, inner)
    return found


@pytest.mark.parametrize("name, shapes, model, title, class_name", [
    ("qwen_image", language_model(152064, 3584, 18944, 28), "text_encoder", "Qwen2.5-VL-7B",
     "Qwen2_5_VLForConditionalGeneration"),
    ("flux2", language_model(131072, 5120, 32768, 30), "text_encoder", "FLUX.2-dev",
     "Mistral3ForConditionalGeneration"),
    ("flux2", language_model(151936, 4096, 12288, 36), "text_encoder", "Qwen3-8B", "Qwen3ForCausalLM"),
    ("qwen_image", {"encoder.conv1.weight": (96, 3, 3, 3, 3), "decoder.conv1.weight": (384, 16, 3, 3, 3)}, "vae",
     "Qwen-Image", "AutoencoderKLQwenImage"),
])
def test_comfyuis_files_are_known_by_their_real_shapes(name, shapes, model, title, class_name, tmp_path, caplog):
    caplog.set_level("INFO")
    write_sparse(tmp_path / "f.safetensors", shapes)
    pipe = family(name).pipeline.from_pretrained(str(tmp_path / "f.safetensors"))
    assert list(pipe.sources) == [model]
    assert f"f.safetensors: no config.json; by names and shapes it is the {model} of {title}." in caplog.text
    assert pipe.store.component(model).class_name == class_name


def test_the_text_encoder_of_8_bits_that_transformers_made(monkeypatch):
    """With the tower for images, which editing needs, and ComfyUI's factors."""
    folder, cls = ORIGINALS, family("qwen_image").pipeline
    config = json.loads((folder / "qwen_text.json").read_text())
    monkeypatch.setattr(cls, "components", tuple(
        replace(c, known={"tiny": config}) if c.name == "text_encoder" else c for c in cls.components))
    pipe = cls.from_pretrained(str(folder / "qwen_text.safetensors"))
    checkpoint = in_our_names(open_checkpoint(folder / "qwen_text.safetensors"))
    stored, found = dict(checkpoint.tensors()), state_dict(pipe.text_encoder) | state_dict(pipe.vision_tower)
    assert found.keys() == stored.keys() - {"lm_head.weight"}
    for key, array in found.items():
        np.testing.assert_array_equal(array, stored[key].astype(array.dtype), err_msg=key)


def test_an_edit_model_of_comfyui_says_itself_which_it_is(known, tmp_path, monkeypatch):
    folder = known("qwen_image")["dit"]
    tensors = load_state_dict(folder)
    cls = family("qwen_image").pipeline
    dit = next(c for c in cls.components if c.name == "dit")
    configs = {"plain": dit.known["tiny"], "2511": dit.known["tiny"] | {"zero_cond_t": True}}
    monkeypatch.setattr(cls, "components", tuple(
        replace(c, known=configs) if c.name == "dit" else c for c in cls.components))
    save_state_dict(tmp_path / "plain.safetensors", tensors)
    save_state_dict(tmp_path / "2511.safetensors", tensors | {"__index_timestep_zero__": np.zeros(0, np.float32)})
    plain, edit = (cls.from_pretrained(str(tmp_path / f"{name}.safetensors")) for name in ("plain", "2511"))
    assert not plain.config("dit").get("zero_cond_t") and edit.config("dit")["zero_cond_t"] is True
    assert state_dict(edit.dit).keys() == tensors.keys()
    edit.check_editing()
    with pytest.raises(WeightError, match=r"config\.json is missing: it says how references are modulated"):
        plain.check_editing()
