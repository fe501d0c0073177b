"""A model says how it is sampled and trained: its family by model_index.json, the rest by sampling_config.json."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth import FluxImagePipeline, load_config
from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.models import SAMPLING_FILE
from ms_diffsynth.registry import FAMILIES, MODEL_CLASSES, family, family_of
from ms_diffsynth.run.pipeline import most_pixels

OWN = {"cfg_scale": 2.0, "height": 16, "width": 24, "num_inference_steps": 3}


def say(model, **settings):
    (model / SAMPLING_FILE).write_text(json.dumps(settings))
    return model


def picture(path):
    return np.asarray(Image.open(path))


def test_the_command_needs_nothing_that_the_model_says(run, toy_model, tmp_path):
    model = shutil.copytree(toy_model, tmp_path / "own")  # other tests have the same model
    given = ["--height", 16, "--width", 24, "--num_inference_steps", 3, "--cfg_scale", 2]
    assert run("sample", "toy", model, "--prompt", "a", *given, "--output", "given")[0] == 0
    assert run("sample", say(model, **OWN), "--prompt", "a", "--output", "own_defaults")[0] == 0
    assert (picture("given/000-seed0.png") == picture("own_defaults/000-seed0.png")).all()
    assert run("sample", model, "--prompt", "a", "--width", 16, "--output", "told")[0] == 0
    assert picture("told/000-seed0.png").shape == (16, 16, 3)  # what is told wins


@pytest.mark.parametrize("words, expected", [
    (["absent"], "MODEL absent does not exist: expected a folder, emoji-flux or owner/name."),
    (["emoji-flx"], "Did you mean 'emoji-flux'?"),
    (["."], "has no model_index.json, which tells the family of a model"),
    (["toy", "m", "a", "cat"], "4 arguments, toy, m, a, cat: expected a model, or a family and a model. Put quotes"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_names_no_model(run, words, expected):
    code, out, err = run("sample", *words, "--prompt", "a")
    assert code == 64 and out == "" and expected in err


def test_a_model_of_a_class_that_is_none(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ConfigError, match="describes a KandinskyPipeline: expected one of DDPMPipeline, Flux2Klein"):
        family_of(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.few(3)
def test_a_tiny_model_tells_its_family(tmp_path, name):
    family(name).write_tiny(tmp_path / "m", 0)
    assert family_of(tmp_path / "m") == name and name in MODEL_CLASSES.values()


def test_python_and_training_take_what_the_model_says(tmp_path):
    family("flux").write_tiny(tmp_path / "m", 0)
    before = FluxImagePipeline.from_pretrained(str(tmp_path / "m"))
    pipe = FluxImagePipeline.from_pretrained(str(say(tmp_path / "m", **OWN, max_sequence_length=16)))
    assert (before.max_sequence_length, pipe.max_sequence_length) == (512, 16)
    assert (pipe.sampling.cfg_scale, pipe.sampling.width, pipe.sampling.embedded_guidance) == (2.0, 24, 3.5)
    assert FluxImagePipeline.sampling.cfg_scale == before.sampling.cfg_scale == 1.0  # of one pipeline only
    settings = {"family": "flux", "model_paths": str(tmp_path / "m"), "dataset_base_path": ".", "output_path": "o",
                "max_train_steps": 1}
    assert most_pixels(load_config(**settings)) == 16 * 24
    assert most_pixels(load_config(**settings, max_pixels=4096)) == 4096
    (tmp_path / "m" / SAMPLING_FILE).unlink()
    assert most_pixels(load_config(**settings)) == 1024 * 1024


@pytest.mark.parametrize("settings, expected", [
    ({"cfg_scal": 2}, "says cfg_scal: expected some of cfg_scale, .* Did you mean 'cfg_scale'?"),
    ({"width": 0}, "says width=0: expected a whole number from 1"),
    ({"cfg_scale": "2"}, 'says cfg_scale="2": expected a number above 0'),
])
@pytest.mark.few(1)
def test_a_file_that_says_what_cannot_be(tmp_path, settings, expected):
    family("flux").write_tiny(tmp_path / "m", 0)
    with pytest.raises(WeightError, match=expected):
        FluxImagePipeline.from_pretrained(str(say(tmp_path / "m", **settings)))
