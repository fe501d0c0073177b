"""A VAE in tiles: where they lie, that they fade into one another, and what becomes of the whole."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from arrays import noise_image
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.compile import eagerly
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.pipelines.shared.tiles import Tiles, in_tiles, weights
from ms_diffsynth.registry import family
from ms_diffsynth.units import run_unit

pytestmark = pytest.mark.usefixtures("eager")
FAMILIES = [name if name == "toy" else pytest.param(name, marks=pytest.mark.slow)
            for name in ("toy", "flux", "sd3", "sdxl", "flux2", "qwen_image", "z_image")]


@pytest.mark.parametrize("length, size, stride, expected", [
    (10, 10, 5, [0]), (7, 10, 5, [0]), (11, 10, 5, [0, 1]), (20, 10, 5, [0, 5, 10]), (22, 10, 5, [0, 5, 10, 12]),
    (20, 10, 10, [0, 10]), (12, 5, 2, [0, 2, 4, 6, 7])])
def test_tiles_have_one_size_and_leave_no_gap(length, size, stride, expected):
    starts = Tiles(size, stride).starts(length)
    assert starts == expected
    if length > size:
        assert starts[-1] + size == length and max(np.diff(starts)) <= stride


@pytest.mark.parametrize("starts, size", [([0], 4), ([0, 4], 4), ([0, 2, 3], 4), ([0, 1, 2, 3, 4], 6), ([0, 5], 8)])
def test_at_every_place_the_weights_are_one_in_all(starts, size):
    total = np.zeros(starts[-1] + size)
    for start, share in zip(starts, weights(starts, size)):
        total[start:start + size] += share
    np.testing.assert_allclose(total, 1, atol=1e-7)


def test_one_tile_fades_into_the_next_along_a_straight_line():
    first, second = weights([0, 4], 8)
    np.testing.assert_allclose(first, [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125], rtol=1e-6)
    np.testing.assert_allclose(second, first[::-1], rtol=1e-6)


@pytest.mark.parametrize("height, width", [(40, 24), (24, 40), (36, 44)])
def test_what_each_pixel_gives_by_itself_is_the_same_in_tiles(height, width):
    image = np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32)
    shapes = []

    def thrice(x):
        shapes.append(x.shape)
        return 3 * x

    found = in_tiles(thrice, Tensor(image), Tiles(8, 3), 2, 2).asnumpy()
    np.testing.assert_allclose(found, 3 * image, rtol=1e-6, atol=1e-6)
    assert len(shapes) > 4 and set(shapes) == {(2, 3, 16, 16)}


def test_gradients_pass_through_tiles():
    image, probe = np.random.default_rng(0).standard_normal((2, 1, 1, 12, 12)).astype(np.float32)

    def loss(x):
        return (in_tiles(lambda tile: tile * tile, x, Tiles(4, 2), 1, 1) * Tensor(probe)).sum()

    found = eagerly(ms.grad(loss), Tensor(image)).asnumpy()
    np.testing.assert_allclose(found, 2 * image * probe, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments, expected", [
    ({"tile_size": 0}, "tile_size=0: expected a positive integer"),
    ({"tile_size": 8.0}, "tile_size=8.0: expected a positive integer"),
    ({"tile_size": True}, "tile_size=True: expected"),
    ({"tile_stride": -1}, "tile_stride=-1: expected a positive integer"),
    ({"tile_size": 8, "tile_stride": 9}, "tile_stride=9: expected at most tile_size=8"),
    ({"tile_stride": 200}, "tile_stride=200: expected at most tile_size=128"),
    ({"tile_size": 0, "tile_stride": "a"}, "tile_size=0: .*tile_stride='a': expected"),
    ({"tile_size": 7, "multiple": 2}, "tile_size=7: expected a positive multiple of 2"),
    ({"tiled": "yes"}, "tiled='yes': expected true or false")])
def test_tiles_that_cannot_be(arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        Tiles.of(**{"tiled": True} | arguments)
    assert Tiles.of(True) == Tiles(128, 64) and Tiles.of(True, 7) == Tiles(7, 3) and Tiles.of(True, 1) == Tiles(1, 1)
    assert Tiles.of(True, 6, multiple=2) == Tiles(6, 2) and Tiles.of(False, 8, 8) is None


@pytest.fixture(params=FAMILIES)
def pipe(request, tiny_model):
    return family(request.param).pipeline.from_pretrained(str(tiny_model(request.param)))


def test_an_image_no_larger_than_a_tile_gives_the_same_bytes(pipe):
    image = pipe.preprocess_image(noise_image(48, 64))
    latents = pipe.vae.encode(image, tiled=False)
    assert latents.shape == (1, *pipe.latent_shape(48, 64))
    for size in (16, 128):  # in latent pixels: the image's larger side, and more
        tiled = pipe.vae.encode(image, tiled=True, tile_size=size)
        np.testing.assert_array_equal(tiled.asnumpy(), latents.asnumpy())
        whole, parts = (pipe.vae.decode(latents, device=pipe.device, tiled=t, tile_size=size).asnumpy()
                        for t in (False, True))
        np.testing.assert_array_equal(parts, whole)
    assert whole.shape == (1, 3, 48, 64)


def test_the_vae_and_the_units_give_the_same(pipe):
    image, how = pipe.preprocess_image(noise_image(48, 64)), {"tiled": True, "tile_size": 4, "tile_stride": 2}
    units = [unit for unit in pipe.units if unit.name in ("encode_image", "sample_latents")]
    wanted = pipe.run(units, {"pixels": image, **how})["input_latents"]
    found = pipe.vae.encode(image.to(device=pipe.device, dtype=pipe.torch_dtype), **how)
    np.testing.assert_array_equal(found.asnumpy(), wanted.asnumpy())
    pixels = run_unit(pipe.build_decode(), pipe, {"latents": found, **how})["pixels"]
    np.testing.assert_array_equal(pipe.vae.decode(found, **how).asnumpy(), pixels.asnumpy())
    whole = pipe.vae.encode(image, tiled=False).asnumpy()
    if type(pipe).__name__ == "ToyImagePipeline":  # each latent pixel by itself: tiles change nothing
        np.testing.assert_allclose(found.asnumpy(), whole, rtol=1e-5, atol=1e-5)
    else:
        assert found.shape == whole.shape and (found.asnumpy() != whole).any()


def test_the_difference_falls_as_tiles_grow(pipe):
    """Tiles that overlap by half, of a half and of three quarters of a smooth image's side."""
    y, x = np.mgrid[:128, :128] / 128
    image = Tensor((0.8 * np.sin(2 * np.pi * np.stack([x + y, 2 * x, 1.5 * y])))[None].astype(np.float32))
    given = {"encode": image, "decode": pipe.vae.encode(image, tiled=False)}
    for what, value in given.items():
        whole = getattr(pipe.vae, what)(value, tiled=False).asnumpy()
        error = [np.square(getattr(pipe.vae, what)(value, tiled=True, tile_size=size).asnumpy() - whole).mean()
                 for size in (8, 12)]
        relative = np.sqrt(np.array(error) / np.square(whole).mean())
        if type(pipe).__name__ == "ToyImagePipeline":
            assert max(relative) < 1e-5
        else:  # random weights, whose norms react most; measured: see docs/how_to/sampling.md
            assert 1e-3 < relative[1] < relative[0] < 1, (what, relative)


def test_without_tiled_a_vae_is_the_network_that_it_was(tiny_model):
    pipe = family("flux").pipeline.from_pretrained(str(tiny_model("flux")))
    image = pipe.preprocess_image(noise_image(32, 32))
    (moments,) = pipe.vae.encode(image)
    (pixels,) = pipe.vae.decode(moments[:, :16], return_dict=False)
    assert moments.shape == (1, 32, 4, 4) and pixels.shape == image.shape
    assert type(pipe.vae).__name__ == "AutoencoderKL"


def test_all_tiles_are_one_compilation(tiny_model):
    runtime.configure("graph", runtime.current().device)
    try:
        pipe = family("toy").pipeline.from_pretrained(str(tiny_model("toy")))
        encode = next(unit for unit in pipe.units if unit.name == "encode_image")
        given = {"pixels": pipe.preprocess_image(noise_image(72, 56)), "tiled": True, "tile_size": 6, "tile_stride": 4}
        eager = run_unit(encode, pipe, given)["moments"].asnumpy()
        pipe.units_to_compile = frozenset({"encode_image"})
        found = run_unit(encode, pipe, given)["moments"].asnumpy()
        (compiled,) = pipe.compiled_steps.values()
        assert compiled.compilations == 1
        np.testing.assert_allclose(found, eager, rtol=1e-5, atol=1e-5)
    finally:
        runtime.configure("pynative", runtime.current().device)
