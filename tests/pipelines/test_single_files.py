"""A pipeline of single files without config.json, in their publishers' names, is the one of diffusers' folders."""
from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from device import DEVICE

from ms_diffsynth import ModelConfig, runtime
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.originals import in_one_file
from ms_diffsynth.formats.weights import load_state_dict, open_checkpoint, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import family, interchange


@pytest.fixture
def known(tiny_model, monkeypatch):
    """``known(family)``: the family knows its tiny model by names and shapes. Returns: model -> its folder."""
    def make(name):
        folder, cls = tiny_model(name), family(name).pipeline
        monkeypatch.setattr(cls, "components", tuple(
            replace(c, known={"tiny": json.loads((folder / c.folder / "config.json").read_text())}) if c.known else c
            for c in cls.components))
        return {c.name: folder / c.folder for c in cls.components if c.known}
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


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "sd3"])
def test_single_files_are_the_models_of_the_folders(name, single, tiny_model, caplog):
    caplog.set_level("INFO")
    files, cls = single(name), family(name).pipeline
    pipe, expected = cls.from_pretrained(files), cls.from_pretrained(str(tiny_model(name)))
    models = [c.name for c in cls.components if c.known]
    assert set(pipe.sources) == set(models)
    assert "no config.json; by names and shapes it is the dit of tiny" in caplog.text
    assert_same_models(pipe, expected, models)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_whole_pipeline_in_one_file_is_that_of_the_folders(name, known, tiny_model, tmp_path, caplog):
    checkpoints = {model: open_checkpoint(folder) for model, folder in known(name).items()}
    if name == "sd3":
        left = {k: v for k, v in checkpoints["text_encoder_1"].entries.items() if k != "text_projection.weight"}
        checkpoints["text_encoder_1"] = checkpoints["text_encoder_1"].with_entries(left)
    whole = in_one_file(checkpoints, interchange(name))
    assert {key.split(".")[0] for key in whole.entries} == {"model", "text_encoders",
                                                            "vae" if name == "flux" else "first_stage_model"}
    more = {"text_encoders.clip_l.logit_scale": np.ones((), np.float32), "model_ema.x": np.ones(2, np.float32)}
    save_state_dict(tmp_path / "whole.safetensors", whole.with_arrays(more))
    pipe = family(name).pipeline.from_pretrained(str(tmp_path / "whole.safetensors"))
    assert "1 tensors are of no model that is used here, and left out: model_ema.x" in caplog.text
    assert pipe.sources.keys() == checkpoints.keys()
    assert_same_models(pipe, family(name).pipeline.from_pretrained(str(tiny_model(name))), checkpoints)
    without = whole.with_entries({k: v for k, v in whole.entries.items() if "final_layer.linear" not in k})
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
