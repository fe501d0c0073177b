"""Folders of pictures, and their features against those of the PyTorch implementation."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.errors import DataError
from ms_diffsynth.evaluate.features import ImageFolder, network_input

RECORDED = Path(__file__).parent / "efficientnet_lite0_torch.npz"
DATA = Path(__file__).parents[2] / "examples" / "data"


def test_features_equal_those_of_pytorch(describe):
    recorded = np.load(RECORDED)
    found = describe([Image.open(DATA / name) for name in recorded["names"]])
    assert found.features.shape == (3, 1280) and found.features.dtype == np.float64
    # features go up to 4; the largest difference over 16 pictures was 9e-6 (docs/how_to/evaluation.md)
    assert np.abs(found.features - recorded["features"]).max() < 5e-5
    assert np.abs(recorded["features"]).max() > 3 and found.sizes == {(256, 256)}


def test_a_picture_has_the_same_features_in_any_batch(describe, animals):
    pictures = [animals[k] for k in range(9)]
    together = describe(pictures)
    for k in (0, 4, 8):
        alone = describe([pictures[k]])
        assert np.abs(alone.features[0] - together.features[k]).max() < 2e-5
        assert np.array_equal(alone.pixels[0], together.pixels[k])


def test_coarse_pixels_are_averages(describe):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 24:] = (100, 200, 250)
    found = describe([Image.fromarray(pixels)]).pixels.reshape(16, 16, 3)
    assert np.array_equal(found[:, :8], np.zeros((16, 8, 3))) and (found[:, 8:] == (100, 200, 250)).all()


def test_the_network_sees_a_picture_of_any_size_at_224_pixels_without_aliasing():
    # of lines of one pixel antialiasing leaves flat gray; picking single pixels would leave stripes of +-1
    stripes = np.zeros((900, 700, 3), np.uint8)
    stripes[::2] = 255
    found = network_input(Image.fromarray(stripes))
    assert found.shape == (3, 224, 224) and found.dtype == np.float32
    assert np.abs(found[:, 2:-2]).max() < 0.05
    ends = network_input(Image.fromarray(np.repeat(np.array([[[0, 127, 255]]], np.uint8), 20, 0).repeat(20, 1)))
    assert np.array_equal(ends[:, 100, 100], np.float32([-127 / 128, 0, 1]))


def test_a_size_crops_as_training_does(describe, animals):
    wide = Image.new("RGB", (384, 256), "white")
    wide.paste(animals[0], (64, 0))
    found = describe([wide], size=(256, 256))
    assert np.abs(found.features - describe([animals[0]]).features).max() < 2e-5 and found.sizes == {(256, 384)}


def test_every_picture_that_cannot_be_read_is_named(describe, tmp_path, animals):
    for k in range(20):
        animals[0].resize((32, 32)).save(tmp_path / f"{k:02d}.png")
    broken = [f"{k:02d}.png" for k in range(3, 16)]
    for name in broken:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    with pytest.raises(DataError) as error:
        describe(ImageFolder(tmp_path))
    assert "13 of 20 images" in str(error.value) and all(name in str(error.value) for name in broken)


def test_a_folder_is_searched_below_without_hidden_names_and_other_files(tmp_path):
    for name in ("b.png", "a/c.jpg", ".hidden.png", ".cache/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    (tmp_path / "metadata.csv").write_text("image\nb.png\n")
    folder = ImageFolder(tmp_path)
    assert folder.names == ("a/c.jpg", "b.png") and len(folder) == 2 and folder[1].size == (16, 16)
    os.symlink(tmp_path / "b.png", tmp_path / "e.png")
    assert folder.files() == {(tmp_path / name).resolve() for name in folder.names}


@pytest.mark.parametrize("make, expected", [(False, "is not a folder"), (True, "contains no images")])
def test_a_folder_without_pictures_is_an_error(tmp_path, make, expected):
    if make:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "notes.txt").write_text("none")
    with pytest.raises(DataError, match=f"{expected}"):
        ImageFolder(tmp_path / "pictures")
