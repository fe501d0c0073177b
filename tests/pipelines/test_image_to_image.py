"""Sampling that starts from an image, by the units of training; and the documents' unit for both, as it stands."""
from __future__ import annotations

import numpy as np
import pytest
from arrays import noise_image
from device import DEVICE
from PIL import Image

from ms_diffsynth import Accelerator, DiffusionTrainingModule, ModelLogger, PipelineUnit, launch_training_task, runtime
from ms_diffsynth.errors import ConfigError, ProgramError
from ms_diffsynth.pipelines.flux2 import units as flux2_units
from ms_diffsynth.registry import family

pytestmark = pytest.mark.usefixtures("eager")
SMALL = {"prompt": "a cat", "seed": 1, "num_inference_steps": 4, "height": 32, "width": 48}
OURS = ("load_pixels", "encode_image", "sample_latents")
FAMILIES = [name if name == "toy" else pytest.param(name, marks=pytest.mark.slow)
            for name in ("toy", "flux", "sd3", "flux2", "qwen_image")]
IMAGE = noise_image(32, 48)


class QwenImageUnit_InputImageEmbedder(PipelineUnit):
    """From DiffSynth-Studio's page on training, unchanged but for the annotation of ``pipe``."""

    def __init__(self):
        super().__init__(
            input_params=("input_image", "noise", "tiled", "tile_size", "tile_stride"),
            output_params=("latents", "input_latents"),
            onload_model_names=("vae",)
        )

    def process(self, pipe, input_image, noise, tiled, tile_size, tile_stride):
        if input_image is None:
            return {"latents": noise, "input_latents": None}
        pipe.load_models_to_device(['vae'])
        image = pipe.preprocess_image(input_image).to(device=pipe.device, dtype=pipe.torch_dtype)
        input_latents = pipe.vae.encode(image, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
        if pipe.scheduler.training:
            return {"latents": noise, "input_latents": input_latents}
        else:
            latents = pipe.scheduler.add_noise(input_latents, noise, timestep=pipe.scheduler.timesteps[0])
            return {"latents": latents, "input_latents": input_latents}


def pipeline(name, tiny_model, *own_units):
    """A pipeline; with its units for the image replaced by others, if there are any."""
    pipe = family(name).pipeline.from_pretrained(str(tiny_model(name)))
    if hasattr(pipe, "max_sequence_length"):
        pipe.max_sequence_length = 16
    if own_units:
        pipe.units = [*(unit for unit in pipe.units if unit.name not in OURS), *own_units]
    return pipe


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_strength_says_how_much_is_made_anew(name, tiny_model):
    pipe = pipeline(name, tiny_model)
    told = []
    without = pipe(**SMALL)
    made = {strength: pipe(**SMALL, input_image=IMAGE, denoising_strength=strength,
                           on_step=lambda k, steps: told.append(steps)) for strength in (0.25, 0.6, 1)}
    assert told == [1] + [3] * 3 + [4] * 4
    np.testing.assert_array_equal(made[1], without)  # at 1 it starts from the same noise
    assert all(image.size == (48, 32) for image in made.values())
    assert (pixels(made[0.25]) != pixels(made[0.6])).any() and (pixels(made[0.6]) != pixels(without)).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_documents_unit_samples_what_ours_sample(name, tiny_model):
    ours, theirs = pipeline(name, tiny_model), pipeline(name, tiny_model, QwenImageUnit_InputImageEmbedder())
    for given in ({}, {"input_image": IMAGE}, {"input_image": IMAGE, "denoising_strength": 0.5},
                  {"input_image": IMAGE, "denoising_strength": 0.5, "cfg_scale": 2.0},
                  {"input_image": IMAGE, "denoising_strength": 0.5, "tiled": True, "tile_size": 4, "tile_stride": 2}):
        np.testing.assert_array_equal(theirs(**SMALL, **given), ours(**SMALL, **given))


class Module(DiffusionTrainingModule):
    """A LoRA of the network, of a family's own units or of others."""

    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe
        self.switch_pipe_to_training_mode(pipe, lora_base_model="dit", lora_rank=2)


class Eager(Module):
    """Computes its loss itself: every unit by the pipeline's runner, with the documents' names."""

    def forward(self, data):
        return super().forward(data)


def losses(module, folder, mode="pynative"):
    rows = [{"image": noise_image(32, 32, seed), "prompt": f"a cat {seed}"} for seed in range(2)]
    launch_training_task(Accelerator(1, mode, DEVICE), rows, module, ModelLogger(folder), learning_rate=0.01,
                         max_train_steps=2, num_epochs=None, save_steps=None)
    return [float(line.split(",")[2]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("module", [Module, Eager])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_documents_unit_trains_as_ours_do(name, module, tiny_model, tmp_path):
    ours = losses(module(pipeline(name, tiny_model)), tmp_path / "ours")
    theirs = losses(module(pipeline(name, tiny_model, QwenImageUnit_InputImageEmbedder())), tmp_path / "theirs")
    assert len(ours) == 2
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_the_documents_unit_trains_compiled(tiny_model, tmp_path):
    ours = losses(Module(pipeline("toy", tiny_model)), tmp_path / "ours")
    theirs = losses(Module(pipeline("toy", tiny_model, QwenImageUnit_InputImageEmbedder())), tmp_path / "theirs",
                    "graph")
    runtime.configure("pynative", DEVICE)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


class Recording(QwenImageUnit_InputImageEmbedder):
    """Remembers what it was told."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def process(self, pipe, input_image, noise, **tiles):
        self.seen.append((pipe.scheduler.training, len(pipe.scheduler.timesteps), noise is None, tiles["tiled"]))
        return super().process(pipe, input_image, noise, **tiles)


def test_the_scheduler_is_training_only_while_rows_are_prepared(tiny_model, tmp_path):
    unit = Recording()
    pipe = pipeline("toy", tiny_model, unit)
    pipe(**SMALL, input_image=IMAGE, denoising_strength=0.5)
    assert unit.seen == [(False, 2, False, False)] and not pipe.scheduler.training
    module = Module(pipe)
    assert pipe.scheduler.training and len(pipe.scheduler.sigmas) == 1000
    losses(module, tmp_path)
    assert unit.seen[1:] == [(True, 1000, True, False)] * 2
    pipe(**SMALL, input_image=IMAGE)  # a sample of a run
    assert unit.seen[3:] == [(False, 4, False, False)] and pipe.scheduler.training


def test_rows_are_prepared_in_tiles_when_they_say_so(tiny_model, tmp_path):
    class InTiles(Module):
        def get_pipeline_inputs(self, data):
            shared, posi, nega = super().get_pipeline_inputs(data)
            return shared | {"tiled": True, "tile_size": 4}, posi, nega

    unit = Recording()
    losses(InTiles(pipeline("toy", tiny_model, unit)), tmp_path / "theirs")
    assert [tiled for *_, tiled in unit.seen] == [True, True]
    sizes = []
    pipe = pipeline("toy", tiny_model)
    own = pipe.vae.own_encode
    pipe.vae.own_encode = lambda x: (sizes.append(x.shape), own(x))[1]
    found = losses(InTiles(pipe), tmp_path / "tiles")
    wanted = losses(Module(pipeline("toy", tiny_model)), tmp_path / "whole")
    assert set(sizes) == {(1, 3, 16, 16)} and len(sizes) == 2 * 9
    np.testing.assert_allclose(found, wanted, rtol=1e-5)  # toy's VAE is one that tiles do not change


@pytest.mark.parametrize("given, expected", [
    ({}, (32, 48)), ({"height": 64}, (64, 48)), ({"height": 64, "width": 16}, (64, 16)), ({"width": 17}, (32, 24))])
def test_the_size_is_that_of_the_image_where_none_is_given(given, expected, tiny_model):
    pipe, short = pipeline("toy", tiny_model), {"prompt": "a", "num_inference_steps": 2, "seed": 0}
    found = pipe(**short, **given, input_image=noise_image(32, 45), denoising_strength=0.5)
    assert found.size[::-1] == expected
    scaled = noise_image(32, 45).resize(found.size, Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found, pipe(**short, input_image=scaled, denoising_strength=0.5))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_other_modes_are_converted(mode, tiny_model):
    image = noise_image(32, 32).convert(mode)
    pipeline("toy", tiny_model)(prompt="a", num_inference_steps=2, input_image=image, denoising_strength=0.5)


@pytest.mark.parametrize("given, expected", [
    ({"denoising_strength": 0}, "denoising_strength=0: expected a number above 0, at most 1"),
    ({"denoising_strength": 1.5}, "denoising_strength=1.5: expected"),
    ({"denoising_strength": float("nan")}, "denoising_strength=nan: expected"),
    ({"denoising_strength": "0.5"}, "denoising_strength='0.5': expected"),
    ({"denoising_strength": None}, "denoising_strength=None: expected"),
    ({"denoising_strength": True}, "denoising_strength=True: expected"),
    ({"input_image": None, "denoising_strength": 0.5}, "denoising_strength=0.5 without input_image"),
    ({"input_image": "cat.png"}, "input_image='cat.png': expected an image of Pillow"),
    ({"input_image": [IMAGE]}, "input_image=.*expected an image of Pillow"),
    ({"tiled": True, "tile_size": 4, "tile_stride": 5}, "tile_stride=5: expected at most tile_size=4"),
    ({"tile_size": -1}, "tile_size=-1: expected a positive integer")])
def test_values_that_are_refused_before_a_model_is_loaded(given, expected, tiny_model):
    pipe = pipeline("toy", tiny_model)
    with pytest.raises(ConfigError, match=expected):
        pipe(**SMALL, **{"input_image": IMAGE} | given)
    assert not pipe.models


def test_flux2_keeps_latents_in_patches_so_its_tiles_are_even(tiny_model):
    pipe = pipeline("flux2", tiny_model)
    with pytest.raises(ConfigError, match="tile_size=5: expected a positive multiple of 2"):
        pipe(**SMALL, tiled=True, tile_size=5)
    assert not pipe.models


def test_edit_images_are_encoded_in_tiles_too(tiny_model, monkeypatch):
    sides = []
    encode = flux2_units.normalised_moments
    monkeypatch.setattr(flux2_units, "normalised_moments",
                        lambda vae, x, *more: (sides.append(x.shape[2:]), encode(vae, x, *more))[1])
    pipe = pipeline("flux2", tiny_model)
    pipe(**SMALL, edit_image=noise_image(32, 64), tiled=True, tile_size=4, tile_stride=2)
    assert set(sides) == {(32, 32)} and len(sides) == 3
    sides.clear()
    pipe(**SMALL, edit_image=noise_image(32, 64))
    assert sides == [(32, 64)]


def test_the_scheduler_before_it_has_levels_and_by_hand(tiny_model):
    pipe = pipeline("flux", tiny_model)
    with pytest.raises(ProgramError, match="no noise levels yet"):
        print(pipe.scheduler.timesteps)
    pipe.scheduler.set_timesteps(10, denoising_strength=0.3, dynamic_shift_len=6)
    wanted = pipe.sampling_sigmas(10, pipe.latent_shape(32, 48))[7:-1]
    np.testing.assert_array_equal(pipe.scheduler.sigmas.asnumpy(), wanted)
    np.testing.assert_allclose(pipe.scheduler.timesteps.asnumpy(), 1000 * wanted)
    assert not pipe.scheduler.training
    pipe.scheduler.set_timesteps(4)
    np.testing.assert_array_equal(pipe.scheduler.sigmas.asnumpy(),
                                  pipe.sampling_sigmas(4, pipe.latent_shape(1024, 1024))[:-1])
    pipe.scheduler.set_timesteps(1000, training=True)
    assert pipe.scheduler.training and len(pipe.scheduler.timesteps) == 1000
    np.testing.assert_array_equal(pipe.scheduler.sigmas.asnumpy(), pipe.training_schedule("sft").sigmas)


def test_noise_is_added_by_the_nearest_timestep(tiny_model):
    from mindspore import Tensor

    pipe = pipeline("toy", tiny_model)
    pipe.scheduler.set_timesteps(4)
    rng, sigmas = np.random.default_rng(0), pipe.scheduler.sigmas.asnumpy()
    x, n = (rng.standard_normal((2, 4, 2, 2)).astype(np.float32) for _ in range(2))
    for k in range(4):
        for timestep in (pipe.scheduler.timesteps[k], float(1000 * sigmas[k]), 1000 * sigmas[k] + 1):
            found = pipe.scheduler.add_noise(Tensor(x), Tensor(n), timestep).asnumpy()
            np.testing.assert_allclose(found, (1 - sigmas[k]) * x + sigmas[k] * n, rtol=1e-5, atol=1e-6)
    each = pipe.scheduler.add_noise(Tensor(x), Tensor(n), pipe.scheduler.timesteps[1:3]).asnumpy()
    for k in range(2):
        np.testing.assert_allclose(each[k], (1 - sigmas[k + 1]) * x[k] + sigmas[k + 1] * n[k], rtol=1e-5, atol=1e-6)
