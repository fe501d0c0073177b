"""Templates on the command line: ``train``, ``template show``, ``template pack``, ``sample``."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.template import load_state_dict, load_template_model

ROOT = Path(__file__).parents[2]
BRIGHTNESS = ROOT / "examples/flux2/templates/brightness"
TRUST = "--trust_template_code"


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("flux2")


@pytest.fixture
def data(tmp_path):
    """Four grey pictures; a row's template inputs are a number or the file it is the mean of."""
    rows = []
    for k in range(4):
        path = tmp_path / f"{k}.png"
        Image.new("RGB", (32, 32), (60 * k,) * 3).save(path)
        inputs = {"scale": 60 * k / 255} if k % 2 else {"image": str(path)}
        rows.append({"image": path.name, "prompt": "a grey square", "template_inputs": inputs})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def flags(model, data, **more):
    given = {"family": "flux2", "model_paths": model, "dataset_base_path": data, "height": 32, "width": 32,
             "dataset_metadata_path": data / "metadata.jsonl", "extra_inputs": "template_inputs",
             "template_model_id_or_path": BRIGHTNESS, "trainable_models": "template_model", "max_sequence_length": 16,
             "remove_prefix_in_ckpt": "pipe.template_model.", "learning_rate": "1e-2", "num_epochs": 1,
             "mode": "pynative", **more}
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_trained_packed_and_sampled(run, model, data):
    shown = ("--sample_prompts", "a grey square", "--sample_template_inputs", '{"scale": 0.9}',
             "--num_inference_steps", 1)
    code, _, err = run("train", *flags(model, data), TRUST, "--output_path", "out", *shown)
    assert code == 0 and "template_model" in err and (picture("out/samples/before_after.png") > 0).any()
    trained = load_state_dict("out/epoch-0.safetensors")
    assert run("template", "pack", BRIGHTNESS, "out/epoch-0.safetensors", "packed", TRUST)[:2] == (0, "packed\n")
    packed = load_template_model("packed", trust_template_code=True)
    assert {n: p.shape for n, p in load_state_dict("packed/model.safetensors").items()} == {
        n: a.shape for n, a in trained.items()}
    np.testing.assert_array_equal(packed.keys[0].place.asnumpy(), trained["keys.0.place"])
    words = ("sample", "flux2", model, "--prompt", "a", "--height", 32, "--width", 32, "--num_inference_steps", 1,
             "--max_sequence_length", 16, "--mode", "pynative")
    assert run(*words, "--output", "without")[0] == 0
    inputs = '[{"scale": 0.1}, {"scale": 0.9, "model_id": 0}]'
    assert run(*words, "--output", "with", "--template", "packed", "--template_inputs", inputs, TRUST)[0] == 0
    assert (picture("with/000-seed0.png") != picture("without/000-seed0.png")).any()


@pytest.mark.slow
def test_split_training_gives_the_same_file(run, model, data):
    assert run("train", *flags(model, data, output_path="single"), TRUST)[0] == 0
    assert run("train", *flags(model, data, output_path="cache", task="sft:data_process"), TRUST)[0] == 0
    stage_two = {"dataset_base_path": "cache", "dataset_metadata_path": "null", "task": "sft:train"}
    assert run("train", *flags(model, data, output_path="split", **stage_two), TRUST)[0] == 0
    assert Path("single/epoch-0.safetensors").read_bytes() == Path("split/epoch-0.safetensors").read_bytes()


@pytest.mark.slow
def test_a_template_for_editing_over_a_base_in_eight_bits(run, model, data):
    rows = [json.loads(line) | {"edit_image": "0.png"} for line in (data / "metadata.jsonl").read_text().splitlines()]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    editing = {"extra_inputs": "edit_image,template_inputs", "data_file_keys": "image,edit_image"}
    base = load_state_dict(model / "transformer")
    for name, more in (("plain", {}), ("stored", {"fp8_models": "dit,text_encoder"})):
        assert run("train", *flags(model, data, output_path=name, **editing, **more), TRUST)[0] == 0
    plain, stored = (load_state_dict(f"{name}/epoch-0.safetensors") for name in ("plain", "stored"))
    assert plain.keys() == stored.keys() and not set(plain) & set(base)  # the base is no part of what is saved
    change = sum(np.square(stored[n] - plain[n]).sum() for n in plain) / sum(np.square(a).sum() for a in plain.values())
    assert 0 < change < 1e-3
    stage_two = {"dataset_base_path": "cache", "dataset_metadata_path": "null", "task": "sft:train"}
    assert run("train", *flags(model, data, output_path="cache", task="sft:data_process", **editing), TRUST)[0] == 0
    assert run("train", *flags(model, data, output_path="split", **editing, **stage_two), TRUST)[0] == 0
    assert Path("split/epoch-0.safetensors").read_bytes() == Path("plain/epoch-0.safetensors").read_bytes()


@pytest.mark.fault
def test_nothing_runs_without_the_flag(run, model, data):
    code, _, err = run("train", *flags(model, data, output_path="out"))
    digest = hashlib.sha256((BRIGHTNESS / "model.py").read_bytes()).hexdigest()
    assert code == 77 and str(BRIGHTNESS / "model.py") in err and digest in err and not Path("out").exists()
    assert run("template", "pack", BRIGHTNESS, "x.safetensors", "packed")[0] == 77
    sample = ("sample", "flux2", model, "--prompt", "a", "--template_inputs", "[{}]", "--template", BRIGHTNESS)
    assert run(*sample)[0] == 77
    assert run("train", *flags(model, data), TRUST, "--trust_template_sha256", "0" * 64)[0] == 77


@pytest.mark.fault
def test_a_configuration_file_cannot_vouch_for_code(run, tmp_path):
    (tmp_path / "c.yaml").write_text("model:\n  family: flux2\n  trust_template_code: true\n"
                                     "data:\n  dataset_base_path: x\nrun:\n  num_epochs: 1\n")
    code, _, err = run("train", "c.yaml")
    assert code == 64 and "trust_template_code in c.yaml line 3: a file cannot say that code is trusted." in err


@pytest.mark.fault
def test_the_code_is_shown_and_not_run(run, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/model.py").write_text("open('canary', 'w')\n")
    code, out, err = run("template", "show", "t")
    assert code == 0 and out == "open('canary', 'w')\n" and "20 bytes, sha256" in err and not Path("canary").exists()


@pytest.mark.parametrize("words, expected", [
    (["--template", "x", "--template_inputs", "{}"], "template_inputs={}: expected a JSON list of objects"),
    (["--template_inputs", "[]"], "template_inputs without --template"),
])
def test_bad_template_flags_of_sample(run, model, words, expected):
    words = [BRIGHTNESS if word == "x" else word for word in words] + [TRUST] * ("--template" in words)
    code, _, err = run("sample", "flux2", model, "--prompt", "a", *words)
    assert code == 64 and expected in err


@pytest.mark.parametrize("change, expected", [
    ({"extra_inputs": "null"}, "without its input: set extra_inputs=template_inputs."),
    ({"template_model_id_or_path": "null"}, "extra_inputs names template_inputs without a template"),
    ({"extra_inputs": "template_inputs,edit_images"}, "extra_inputs names 'edit_images': this model takes "
     "no such input; expected some of edit_image, template_inputs. Did you mean 'edit_image'?"),
    ({"sample_template_inputs": "[1]", "sample_prompts": "a"}, "sample_template_inputs=[1]: expected a JSON object"),
])
def test_settings_that_cannot_be_meant(run, model, data, change, expected):
    code, _, err = run("train", *flags(model, data, **change), TRUST)
    assert code in (64, 65) and expected in err


@pytest.mark.parametrize("row, expected", [
    ({}, "row 2 (line 2): no template_inputs, which other rows have"),
    ({"template_inputs": 0.5}, "row 2 (line 2): template_inputs=0.5: expected an object such as"),
    ({"template_inputs": {"image": "absent.png"}}, "1.png: "),
])
def test_a_row_that_cannot_be_used_is_named(run, model, data, row, expected):
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[1] = json.dumps({"image": "1.png", "prompt": "a grey square"} | row)
    (data / "metadata.jsonl").write_text("\n".join(lines))
    code, _, err = run("train", *flags(model, data), TRUST)
    assert code == 65 and expected in err
    assert "absent.png" not in str(row) or ("absent.png" in err and f"{BRIGHTNESS / 'model.py'} line" in err)
