"""The task autoencoder: its loss and gradients against float64, both modes, resumption, and what it saves."""
from __future__ import annotations

import csv
import inspect

import mindspore as ms
import numpy as np
import pytest
from autoencoder import Autoencoder as Reference, losses
from mindspore import ParameterTuple, Tensor
from PIL import Image
from records import column

from ms_diffsynth import FluxImagePipeline
from ms_diffsynth.cli.main import main
from ms_diffsynth.diffusion.autoencoder import Autoencoder, RandomView
from ms_diffsynth.draws import Draws
from ms_diffsynth.evaluate.weights import load_weights
from ms_diffsynth.formats.weights import open_checkpoint
from ms_diffsynth.nn.names import state_dict, torch_parameters
from ms_diffsynth.pipeline import UnitSequence
from ms_diffsynth.training.module import DiffusionTrainingModule

STRICT = {"fullgraph": True} if "fullgraph" in inspect.signature(ms.jit).parameters else {}
SIDE, CROP = 32, 16


def compiled(function):
    return ms.jit(function, **STRICT)


@pytest.mark.parametrize("crop_size, random_flip", [(None, True), (16, False), (16, True), (32, True)])
@pytest.mark.parametrize("mode", [lambda function: function, compiled], ids=["pynative", "compiled"])
@pytest.mark.few(4)
def test_a_view_is_a_square_at_its_place_mirrored_or_not(crop_size, random_flip, mode):
    unit, random = RandomView(crop_size, random_flip, is_sampled=True), np.random.default_rng(0)

    def call(pixels, noise, draw):
        return unit(pixels, noise, draw)

    call = mode(call)
    pixels, noise = (random.standard_normal(shape).astype(np.float32) for shape in ((6, 3, 32, 40), (6, 4, 4, 5)))
    draw = random.random((6, 3)).astype(np.float32)
    draw[0, :2], draw[1, :2] = 0, np.nextafter(np.float32(1), np.float32(0))  # the first place and the last
    view, left = (x.asnumpy() for x in call(Tensor(pixels), Tensor(noise), Tensor(draw)))
    height, width = (crop_size, crop_size) if crop_size else (32, 40)
    for k in range(6):
        row, col = int(draw[k, 0] * (33 - height)), int(draw[k, 1] * (41 - width))
        expected = pixels[k, :, row : row + height, col : col + width]
        assert np.array_equal(view[k], expected[:, :, ::-1] if random_flip and draw[k, 2] < 0.5 else expected)
    assert np.array_equal(left, noise[:, :, : height // 8, : width // 8])


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, configured):
    from ms_diffsynth.registry import family

    folder = tmp_path_factory.mktemp("models") / "flux"
    family("flux").write_tiny(folder, 0)
    return FluxImagePipeline.from_pretrained(str(folder))


@pytest.mark.slow
def test_loss_and_gradients_equal_float64(pipe):
    """All weights' gradients, along random directions, against differences of the loss in NumPy."""
    module = DiffusionTrainingModule()
    module.pipe = pipe
    module.switch_pipe_to_training_mode(pipe, trainable_models="vae", task="autoencoder",
                                        objective=Autoencoder(crop_size=CROP, random_flip=True, kl_weight=0.1))
    cut = module.training_cut(outputs=("loss", "sample_losses", "psnr"))
    assert cut.models("step") == ("vae",) and not cut.models("prepare")
    random = np.random.default_rng(1)
    given = {"pixels": random.uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32),
             "posterior_noise": random.standard_normal((2, 16, 4, 4)).astype(np.float32),
             "view_draw": np.float32([[0.0, 0.99, 0.7], [0.5, 0.3, 0.2]])}
    view = given["pixels"][:, :, :CROP, CROP:].copy()
    view[1] = given["pixels"][1, :, 8 : 8 + CROP, 5 : 5 + CROP][:, :, ::-1]
    weights, noise = state_dict(pipe.vae), given["posterior_noise"][:, :, :2, :2].astype(np.float64)
    eff = load_weights()

    def reference(shift, direction=None):
        shifted = {name: w.astype(np.float64) + (shift * direction[name] if direction else 0)
                   for name, w in weights.items()}
        return losses(Reference(shifted, 4, 8), eff, view.astype(np.float64), noise, kl_weight=0.1)

    expected, image = reference(0)
    parameters = torch_parameters(pipe.vae)
    sequence = UnitSequence(cut, pipe)
    gradient = ms.value_and_grad(sequence.positional, None, ParameterTuple(parameters.values()), has_aux=True)

    def step(*inputs):
        return gradient(*inputs)

    inputs = [Tensor(given[name]) for name in sequence.inputs]
    for run in (step, compiled(step)):
        (loss, sample_losses, psnr), gradients = run(*inputs)
        np.testing.assert_allclose(sample_losses.asnumpy(), expected, rtol=2e-5)
        assert float(loss.asnumpy()) == pytest.approx(expected.mean(), rel=2e-5)
        error = ((np.clip(image, -1, 1) - view)**2).mean((1, 2, 3))
        np.testing.assert_allclose(psnr.asnumpy(), 10 * np.log10(4 / error), rtol=1e-5)
        found = {name: g.asnumpy().astype(np.float64) for name, g in zip(parameters, gradients)}
        for _ in range(3):
            direction = {name: random.standard_normal(w.shape) * np.abs(w).mean() for name, w in weights.items()}
            slope = (reference(1e-6, direction)[0].mean() - reference(-1e-6, direction)[0].mean()) / 2e-6
            assert sum((found[n] * d).sum() for n, d in direction.items()) == pytest.approx(slope, rel=2e-4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six images of smooth colours, with captions."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(6):
        small = Image.fromarray(random.integers(0, 256, (3, 3, 3), np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("colours")
    return folder


def train(family, model, images, output, *more):
    return main(["train", "--family", family, "--model_paths", str(model), "--trainable_models", "vae",
                 "--remove_prefix_in_ckpt", "pipe.vae.", "--task", "autoencoder", "--dataset_base_path", str(images),
                 "--height", str(SIDE), "--width", str(SIDE), "--crop_size", str(CROP), "--random_flip", "true",
                 "--batch_size", "2", "--learning_rate", "2e-3", "--use_ema", "true", "--ema_decay", "0.9",
                 "--output_path", str(output), *more])


@pytest.mark.slow
def test_it_learns_alike_in_both_modes_and_saves_what_diffusers_loads(tiny_model, images, tmp_path):
    model = tiny_model("flux") / "vae"  # nothing else is needed
    assert train("flux", model, images, tmp_path / "graph", "--max_train_steps", "12", "--save_steps", "12") == 0
    found = column(tmp_path / "graph")
    assert np.mean(found[-3:]) < 0.8 * np.mean(found[:3])
    assert train("flux", model, images, tmp_path / "eager", "--max_train_steps", "3", "--mode", "pynative",
                 "--validation_base_path", str(images), "--validation_steps", "3") == 0
    # rounding grows: Adam's first steps divide each gradient, however small, by its own size
    np.testing.assert_allclose(column(tmp_path / "eager"), found[:3], rtol=2e-4)
    table = list(csv.DictReader((tmp_path / "eager" / "validation.csv").open()))
    assert list(table[0]) == ["step", "loss", "psnr"] and float(table[-1]["psnr"]) > float(table[0]["psnr"])

    average, saved = (open_checkpoint(tmp_path / "graph" / name) for name in
                      ("step-12-ema.safetensors", "vae/diffusion_pytorch_model.safetensors"))
    weights = state_dict(FluxImagePipeline.from_pretrained(str(tmp_path / "graph" / "vae")).vae)
    assert set(weights) == set(saved.shapes) == set(average.shapes)
    for name, array in weights.items():
        assert np.array_equal(array, saved[name]) and np.array_equal(array, average[name])


@pytest.mark.slow
def test_a_run_that_was_cut_gives_the_bits_of_one_that_was_not(tiny_model, images, tmp_path):
    model, without = tiny_model("toy"), ("--perceptual_weight", "0", "--save_steps", "6")
    assert train("toy", model, images, tmp_path / "whole", "--max_train_steps", "12", *without) == 0
    assert train("toy", model, images, tmp_path / "cut", "--max_train_steps", "5", *without) == 0
    assert train("toy", model, images, tmp_path / "cut", "--max_train_steps", "12", "--resume", "auto", *without) == 0
    assert np.array_equal(column(tmp_path / "cut"), column(tmp_path / "whole"))
    for name in ("step-12.safetensors", "step-12-ema.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_draws_are_of_whole_latents_and_validation_looks_at_whole_images():
    task = Autoencoder(crop_size=16)
    assert task.draws == ("posterior_noise", "view_draw")
    random = Draws(0).of(np.array([0, 1]))
    assert task.draw("posterior_noise", (2, 16, 4, 4), 1000, random).shape == (2, 16, 4, 4)
    assert task.draw("view_draw", (2, 16, 4, 4), 1000, random).shape == (2, 3)
    assert task.validated() == Autoencoder(posterior="mean") and task.validated().draws == ()
    assert "squares of 16 pixels" in str(task) and "whole images" in str(task.validated())


def test_a_family_without_a_vae_is_told(tiny_model, images, tmp_path, capsys):
    assert main(["train", "--family", "ddpm_unet", "--model_paths", str(tiny_model("ddpm_unet")), "--trainable_models",
                 "unet", "--task", "autoencoder", "--dataset_base_path", str(images), "--height", "32", "--width", "32",
                 "--max_train_steps", "1", "--output_path", str(tmp_path / "out")]) != 0
    assert "task=autoencoder" in capsys.readouterr().err
