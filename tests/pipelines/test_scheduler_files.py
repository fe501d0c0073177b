"""scheduler_config.json decides the noise levels of training and sampling, in every family that has one."""
from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from hub_server import HubServer, only_this_machine

from ms_diffsynth import Flux2ImagePipeline, FluxImagePipeline, ModelConfig, QwenImagePipeline
from ms_diffsynth.errors import ConfigError, WeightError

FLOW_MATCH = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
LIGHTNING = FLOW_MATCH | {"use_dynamic_shifting": True, "base_shift": math.log(3), "max_shift": math.log(3),
                          "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift": 1.0, "shift_terminal": None,
                          "time_shift_type": "exponential"}
FIXED = FLOW_MATCH | {"shift": 5.0, "use_dynamic_shifting": False}


@pytest.fixture
def folders(tiny_flux, tiny_flux2, tiny_qwen):
    return {FluxImagePipeline: tiny_flux, Flux2ImagePipeline: tiny_flux2, QwenImagePipeline: tiny_qwen}


def with_file(folder, tmp_path, config):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("cls", [FluxImagePipeline, Flux2ImagePipeline, QwenImagePipeline])
def test_the_file_decides(cls, folders, tmp_path):
    published = cls.from_pretrained(str(folders[cls]))
    pipe = cls.from_pretrained(str(with_file(folders[cls], tmp_path, FIXED)))
    # diffusers 0.42.1 with this file: 4 steps of any size, and the sigmas of training at 1, 500 and 998
    np.testing.assert_allclose(pipe.sampling_sigmas(4, (16, 64, 64)), [1.0, 0.9375, 0.8333333, 0.625, 0.0], atol=2e-7)
    assert np.abs(published.sampling_sigmas(4, (16, 64, 64))[1:4] - [0.9375, 0.8333333, 0.625]).max() > 0.05
    for task in ("dreambooth", "sft"):
        np.testing.assert_allclose(pipe.training_schedule(task).sigmas[[1, 500, 998]],
                                   [0.9997998, 0.8333333, 0.009920635], atol=2e-7)


@pytest.mark.parametrize("cls", [FluxImagePipeline, Flux2ImagePipeline, QwenImagePipeline])
def test_dynamic_shifting_leaves_the_grid_of_training_unshifted(cls, folders):
    """As FLUX.1-dev's scheduler has it: mean 0.5005, and half of the noise levels below 0.5."""
    sigmas = cls.from_pretrained(str(folders[cls])).training_schedule("dreambooth").sigmas
    assert sigmas.mean() == pytest.approx(0.5005, abs=1e-6) and (sigmas < 0.5).mean() == pytest.approx(0.499)


def test_supervised_training_keeps_diffsynths_grid_where_the_file_shifts_as_the_published_one(folders, tmp_path):
    published = QwenImagePipeline.from_pretrained(str(folders[QwenImagePipeline]))
    pipe = QwenImagePipeline.from_pretrained(str(with_file(folders[QwenImagePipeline], tmp_path, LIGHTNING)))
    assert np.array_equal(pipe.training_schedule("sft").sigmas, published.training_schedule("sft").sigmas)


def test_qwen_image_lightning(folders, tmp_path):
    """Its four steps at 1024 pixels; Qwen-Image's own are 1, 0.767, 0.456, 0.02."""
    pipe = QwenImagePipeline.from_pretrained(str(with_file(folders[QwenImagePipeline], tmp_path, LIGHTNING)))
    np.testing.assert_allclose(pipe.sampling_sigmas(4, (16, 128, 128)), [1.0, 0.9, 0.75, 0.5, 0.0], atol=2e-7)


def test_a_file_of_its_own_and_a_folder(folders, tmp_path):
    model = with_file(folders[QwenImagePipeline], tmp_path, LIGHTNING)
    for path in (model / "scheduler", model / "scheduler" / "scheduler_config.json"):
        pipe = QwenImagePipeline.from_pretrained([ModelConfig(str(folders[QwenImagePipeline] / "transformer")),
                                                  ModelConfig(str(path))])
        np.testing.assert_allclose(pipe.sampling_sigmas(4, (16, 8, 8)), [1.0, 0.9, 0.75, 0.5, 0.0], atol=2e-7)


def test_without_a_file_the_published_settings_hold(folders, tmp_path):
    model = with_file(folders[FluxImagePipeline], tmp_path, FIXED)
    shutil.rmtree(model / "scheduler")
    pipe = FluxImagePipeline.from_pretrained(str(model))
    # FLUX.1-dev's at 512 pixels: mu = 0.63
    wanted = [1, 0.8492348, 0.6524894, 0.3849447, 0]
    np.testing.assert_allclose(pipe.sampling_sigmas(4, (16, 64, 64)), wanted, atol=3e-7)


@pytest.mark.parametrize("text, error, expected", [
    (json.dumps(LIGHTNING | {"use_beta_sigmas": True}), ConfigError, "sets use_beta_sigmas=True, which is not"),
    (json.dumps({"_class_name": "DDIMScheduler"}), ConfigError, "describes a DDIMScheduler: expected a FlowMatchEuler"),
    ("{", WeightError, "scheduler_config.json is not JSON"),
    ("[1]", WeightError, "expected an object"),
])
def test_a_file_that_cannot_be_obeyed_is_refused(folders, tmp_path, text, error, expected):
    model = with_file(folders[QwenImagePipeline], tmp_path, {})
    (model / "scheduler" / "scheduler_config.json").write_text(text)
    pipe = QwenImagePipeline.from_pretrained(str(model))
    for call in (lambda: pipe.sampling_sigmas(4, (16, 8, 8)), lambda: pipe.training_schedule("dreambooth")):
        with pytest.raises(error, match=expected):
            call()


def test_the_file_of_a_hub_comes_with_the_network(folders, tmp_path, monkeypatch):
    only_this_machine(monkeypatch)
    model = with_file(folders[QwenImagePipeline], tmp_path, LIGHTNING)
    files = {f"{part}/{path.name}": path.read_bytes() for part in ("transformer", "scheduler")
             for path in (model / part).iterdir()}
    with HubServer() as server:
        server.add("owner/lightning", files)
        config = ModelConfig(model_id="owner/lightning", origin_file_pattern="transformer/*.safetensors",
                             endpoint=server.endpoint, cache_dir=tmp_path / "cache")
        pipe = QwenImagePipeline.from_pretrained([config])
    np.testing.assert_allclose(pipe.sampling_sigmas(4, (16, 8, 8)), [1.0, 0.9, 0.75, 0.5, 0.0], atol=2e-7)
