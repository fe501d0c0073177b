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
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import family, interchange


def original(tensors, model):
    """Tensors in diffusers' names by their publisher's, through the family's table."""
    found, done = {}, set()
    for name, array in tensors.items():
        module, _, part = name.rpartition(".")
        place = model.place(module, "original")
        if name in done or place is None or place[1] is None:
            found |= {} if name in done else {name: array}
            continue
        other, row, members = place
        joined = np.concatenate([tensors[f"{m}.{part}"] for m in members])
        joined = np.roll(joined, len(joined) // 2, axis=0) if row.is_swapped else joined
        if row.is_convolution and part == "weight":
            joined = joined[:, :, None, None]
        found[f"{other}.{row.weight if part == 'weight' else part}"] = joined
        done |= {f"{m}.{part}" for m in members}
    return found


@pytest.fixture
def single(tmp_path, tiny_model, monkeypatch):
    """``single(family)``: a file for each model in one folder, and the family knows the tiny model."""
    def write(name):
        folder, cls = tiny_model(name), family(name).pipeline
        monkeypatch.setattr(cls, "components", tuple(
            replace(c, known={"tiny": json.loads((folder / c.folder / "config.json").read_text())}) if c.known else c
            for c in cls.components))
        for component in cls.components:
            if component.known:
                model = interchange(name).models[component.name]
                save_state_dict(tmp_path / f"{component.name}.safetensors",
                                original(load_state_dict(folder / component.folder), model))
        return [ModelConfig(str(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    runtime.configure("pynative", DEVICE)
    return write


@pytest.mark.parametrize("name", ["flux", "flux2", "z_image"])
def test_single_files_are_the_models_of_the_folders(name, single, tiny_model, caplog):
    caplog.set_level("INFO")
    files, cls = single(name), family(name).pipeline
    pipe, expected = cls.from_pretrained(files), cls.from_pretrained(str(tiny_model(name)))
    models = [c.name for c in cls.components if c.known]
    assert set(pipe.sources) == set(models)
    assert "no config.json; by names and shapes it is the dit of tiny" in caplog.text
    for model in models:
        own, theirs = state_dict(getattr(pipe, model)), state_dict(getattr(expected, model))
        assert own.keys() == theirs.keys()
        for key, array in theirs.items():
            np.testing.assert_array_equal(own[key], array, err_msg=f"{model} {key}")
        assert pipe.config(model) == expected.config(model)


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
