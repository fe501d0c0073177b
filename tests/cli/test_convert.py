"""``ms-diffsynth convert``: single file to folder and back."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ms_diffsynth.cli.main import main
from ms_diffsynth.formats.weights import load_state_dict, open_checkpoint, save_state_dict
from ms_diffsynth.registry import family, family_of


def convert(source, output, to, *flags):
    return main(["convert", str(source), str(output), "--to", to, *flags])


@pytest.fixture
def known(tiny_model, monkeypatch):
    """``known(family)``: the folder of the tiny model, which is known by names and shapes, with further settings."""
    def make(name, **settings):
        folder, cls = tiny_model(name), family(name).pipeline
        monkeypatch.setattr(cls, "components", tuple(
            replace(c, known={"tiny": json.loads((folder / c.folder / "config.json").read_text()) | settings})
            if c.known and (folder / c.folder).is_dir() else c for c in cls.components))
        return folder
    return make


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "sd3", "wan", "z_image"])
def test_a_transformer_there_and_back(name, known, tmp_path, capsys):
    folder = known(name) / "transformer"
    assert convert(folder, tmp_path / "one.safetensors", "original") == 0
    assert convert(tmp_path / "one.safetensors", tmp_path / "again/transformer", "diffusers", "--family", name) == 0
    assert convert(tmp_path / "again/transformer", tmp_path / "two.safetensors", "original", "--family", name) == 0
    assert capsys.readouterr().out.endswith("two.safetensors: dit\n")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    before, after = load_state_dict(folder), load_state_dict(tmp_path / "again/transformer")
    assert before.keys() == after.keys()
    assert all(np.array_equal(array, after[key]) for key, array in before.items())
    own = (folder / "config.json").read_text()
    assert json.loads((tmp_path / "again/transformer/config.json").read_text()) == json.loads(own)
    names = set(load_state_dict(tmp_path / "one.safetensors"))
    beginning = {"flux": "double_blocks.0.img_attn.qkv", "flux2": "double_blocks.0.img_attn.qkv",
                 "qwen_image": "transformer_blocks.0.attn.to_q", "sd3": "model.diffusion_model.joint_blocks.0.x_block",
                 "wan": "blocks.0.self_attn.q", "z_image": "layers.0.attention.qkv"}
    assert any(key.startswith(beginning[name]) for key in names)


@pytest.mark.parametrize("name, begins", [
    ("vae", ("encoder.downsamples.0.residual.0.gamma", "decoder.upsamples.3.resample.1.weight", "conv2.bias")),
    ("text_encoder", ("model.layers.0.self_attn.q_proj.bias", "model.norm.weight"))])
def test_qwen_images_other_models_there_and_back(name, begins, known, tmp_path, capsys):
    folder = known("qwen_image") / name
    assert convert(folder, tmp_path / "one.safetensors", "original") == 0
    assert load_state_dict(tmp_path / "one.safetensors").keys() >= set(begins)
    assert convert(tmp_path / "one.safetensors", tmp_path / "again", "diffusers", "--family", "qwen_image") == 0
    before, after = load_state_dict(folder), load_state_dict(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(np.array_equal(array, after[key]) for key, array in before.items())
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_comfyuis_mark_of_an_edit_model_is_a_setting_in_the_folder(known, tmp_path):
    folder = shutil.copytree(known("qwen_image") / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"zero_cond_t": True}))
    assert convert(folder, tmp_path / "one.safetensors", "original", "--family", "qwen_image") == 0
    assert load_state_dict(tmp_path / "one.safetensors")["__index_timestep_zero__"].size == 0
    known("qwen_image", zero_cond_t=True)
    assert convert(tmp_path / "one.safetensors", tmp_path / "again", "diffusers") == 0
    assert json.loads((tmp_path / "again/config.json").read_text())["zero_cond_t"] is True
    assert load_state_dict(tmp_path / "again").keys() == load_state_dict(folder).keys()


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "sdxl"])
@pytest.mark.few(2)
def test_a_whole_pipeline_there_and_back(name, known, tmp_path):
    folder = known(name)
    assert convert(folder, tmp_path / "one.safetensors", "original") == 0
    assert convert(tmp_path / "one.safetensors", tmp_path / "again", "diffusers") == 0
    assert family_of(tmp_path / "again") == name
    index = json.loads((folder / "model_index.json").read_text())
    assert json.loads((tmp_path / "again/model_index.json").read_text()) == index
    for part in (part for part in index if (folder / part / "config.json").is_file()):
        before, after = load_state_dict(folder / part), load_state_dict(tmp_path / "again" / part)
        assert before.keys() == after.keys()
        assert all(np.array_equal(array, after[key]) for key, array in before.items())


def test_what_a_file_lacks_of_a_pipeline_is_said(known, tmp_path, capsys):
    folder = known("flux")
    convert(folder, tmp_path / "one.safetensors", "original")
    whole = open_checkpoint(tmp_path / "one.safetensors")
    save_state_dict(tmp_path / "two.safetensors", whole.with_entries(
        {k: v for k, v in whole.entries.items() if not k.startswith("text_encoders")}))
    capsys.readouterr()
    assert convert(tmp_path / "two.safetensors", tmp_path / "parts", "diffusers") == 0
    assert "not a whole pipeline: text_encoder, text_encoder_2 are not in" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["transformer", "vae"]


@pytest.mark.fault
def test_what_cannot_be_converted_is_refused(known, tmp_path, capsys):
    folder, out = known("flux"), tmp_path / "out.safetensors"
    assert convert(tmp_path / "absent", out, "original") == 66
    assert "does not exist" in capsys.readouterr().err
    assert convert(folder / "transformer", tmp_path / "out", "original") == 74
    assert "ends in .safetensors" in capsys.readouterr().err
    assert convert(folder / "vae", out, "original") == 0  # the same in every family that has it
    assert convert(folder / "vae", out, "original") == 74
    assert "exists: expected a new file" in capsys.readouterr().err
    assert convert(out, tmp_path / "vae", "diffusers", "--family", "odd") == 64
    assert convert(out, tmp_path / "vae", "diffusers") == 64  # SD3's own VAE has these names and shapes too
    assert "may be of flux or of sd3 or of z_image, which have the same names and shapes" in capsys.readouterr().err
    assert convert(out, tmp_path / "vae", "diffusers", "--family", "flux") == 0
    assert convert(known("z_image"), tmp_path / "z.safetensors", "original") == 66
    assert "no program has text_encoder, vae, dit of Z-Image in one file" in capsys.readouterr().err
