"""Odd pictures that are read: each gives exactly the pixels computed here, within 1 of 255, and lies upright."""
from __future__ import annotations

import io
import logging
import time

import numpy as np
import pytest
from odd_images import ALPHA, DEEP, GRAY, NOISE, blocks, chunk, deep_png, opened, palette, put, saved
from PIL import Image, ImageOps

pytestmark = pytest.mark.fault


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


def over_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def of_ink(cmyk):
    return (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255


CMYK, INK = np.concatenate([NOISE, ALPHA[..., None]], 2), blocks(4)
RGBA, LA = np.concatenate([NOISE, ALPHA[..., None]], 2), np.stack([GRAY, ALPHA], 2)
HIDDEN = np.concatenate([NOISE, np.where(ALPHA < 99, 0, 255).astype(np.uint8)[..., None]], 2)
HIGH = DEEP >> 8  # what Pillow keeps of colours and alphas of 16 bits
ALPHAS = bytes(range(256))
KEY = chunk(b"tRNS", DEEP[:1, 0, 0].astype(">u2").tobytes())
CLEAR = ALPHA[..., None] < 99  # no pixel of NOISE is 77, 77, 77
BITMAP = Image.fromarray(ALPHA > 99)
ACCEPTED = {
    "rgb.png": (saved(NOISE), NOISE),
    "rgb-lossless.webp": (saved(NOISE, "WEBP", lossless=True), NOISE),
    "gray.png": (saved(GRAY), GRAY[..., None]),
    "gray.jpg": (saved(blocks(1)[..., 0], "JPEG", quality=100), blocks(1)),
    "rgb.jpg": (saved(blocks(3), "JPEG", quality=100, subsampling=0), blocks(3)),
    "16-bit-gray.png": (deep_png(DEEP[..., :1]), DEEP[..., :1] / 257),
    "16-bit-gray.tif": (saved(DEEP[..., 0], "TIFF"), DEEP[..., :1] / 257),
    "16-bit-gray-key.png": (deep_png(DEEP[..., :1], KEY), np.where(DEEP[..., :1] == DEEP[0, 0, 0], 255,
                                                                  DEEP[..., :1] / 257)),
    "16-bit-rgb.png": (deep_png(DEEP[..., :3]), DEEP[..., :3] / 257),
    "16-bit-rgba.png": (deep_png(DEEP), over_white(HIGH[..., :3], HIGH[..., 3])),
    "16-bit-gray-alpha.png": (deep_png(DEEP[..., :2]), over_white(HIGH[..., :1], HIGH[..., 1])),
    "cmyk.tif": (saved(CMYK, "TIFF", "CMYK"), of_ink(CMYK)),
    "cmyk-adobe-inverted.jpg": (saved(INK, "JPEG", "CMYK", quality=100), of_ink(INK)),
    "ycbcr.tif": (saved(Image.new("YCbCr", (32, 32), (128, 128, 128)), "TIFF"), np.full((32, 32, 3), 128)),
    "palette.png": palette()[:2],
    "palette-2-bits.png": palette(2)[:2],
    "palette-1-bit.png": palette(1)[:2],
    "palette-one-clear.png": (palette(4, transparency=3)[0],
                              np.where((palette(4)[2] == 3)[..., None], 255, palette(4)[1])),
    "palette-alphas.png": (palette(transparency=ALPHAS)[0], over_white(palette()[1], palette()[2])),
    "palette-one-clear.gif": (saved(Image.open(io.BytesIO(palette(4)[0])), "GIF", transparency=3),
                              np.where((palette(4)[2] == 3)[..., None], 255, palette(4)[1])),
    "gray-alpha.png": (saved(LA, mode="LA"), over_white(LA[..., :1], ALPHA)),
    "rgba.png": (saved(RGBA), over_white(NOISE, ALPHA)),
    "rgba-hidden.png": (saved(HIDDEN), over_white(NOISE, HIDDEN[..., 3])),
    "rgba-hidden.webp": (saved(HIDDEN, "WEBP", lossless=True, exact=True), over_white(NOISE, HIDDEN[..., 3])),
    "rgba-hidden.tif": (saved(HIDDEN, "TIFF"), over_white(NOISE, HIDDEN[..., 3])),
    "rgb-one-clear.png": (saved(np.where(CLEAR, 77, NOISE), transparency=(77, 77, 77)), np.where(CLEAR, 255, NOISE)),
    "bitmap.png": (saved(BITMAP), np.asarray(BITMAP)[..., None] * 255),
    "bitmap-white-is-zero.tif": (saved(BITMAP, "TIFF", compression="group4"), np.asarray(BITMAP)[..., None] * 255),
    "rgb.bmp": (saved(NOISE, "BMP"), NOISE),
    "deflated.tif": (saved(NOISE, "TIFF", compression="tiff_adobe_deflate"), NOISE),
    "rubbish-behind.jpg": (saved(blocks(3), "JPEG", quality=100, subsampling=0) + bytes(1 << 20), blocks(3)),
    "rubbish-behind.png": (saved(NOISE) + b"PK" * 999, NOISE),
    "broken-profile.png": (saved(NOISE, icc_profile=b"rubbish"), NOISE),
    "png-named.jpg": (saved(NOISE), NOISE),
    "16x320.png": (saved(np.resize(NOISE, (320, 16, 3))), np.resize(NOISE, (320, 16, 3))),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_read_as_exactly_these_pixels(folder, name):
    content, expected = ACCEPTED[name]
    put(folder, name, content)
    start = time.thread_time()
    item = opened(folder)[1]
    assert time.thread_time() - start < 1
    found, expected = np.asarray(item["image"], float), np.broadcast_to(expected, (*expected.shape[:2], 3))
    assert item["image"].mode == "RGB" and found.shape == expected.shape and item["prompt"] == "b"
    assert np.abs(found - expected).max() <= 1


# How stored rows and columns lie upright, by the table of the EXIF standard (6: the first row is the right side).
UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_turned_upright(folder, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = blocks(3)[:48]
    put(folder, "odd.png", saved(stored, kind, exif=exif, lossless=True, quality=100, subsampling=0))
    dataset, expected = opened(folder), UPRIGHT[orientation](stored.astype(float))
    assert dataset.image_size(1) == expected.shape[1::-1]
    found = dataset[1]["image"]
    assert np.abs(np.asarray(found, float) - expected).max() <= 1
    assert ImageOps.exif_transpose(found).size == found.size, "it cannot be rotated twice"


NINE = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0"  # one tag, the orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"MM\0*\0\0\0\x08\0\xff\x01\x12", b"rubbish", bytes(60000), NINE],
                         ids=["cut", "rubbish", "zeros", "orientation 9"])
def test_broken_exif_is_ignored_with_a_warning(folder, exif, caplog):
    put(folder, "odd.jpg", saved(blocks(3), "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0" + exif))
    with caplog.at_level(logging.WARNING):
        found = np.asarray(opened(folder)[1]["image"], float)
    assert np.abs(found - blocks(3)).max() <= 1
    assert caplog.text.count(f"{folder}/odd.jpg has broken EXIF data") == 1


def test_a_telephone_photograph_is_its_main_picture_with_a_warning(folder, caplog):
    preview = Image.fromarray(NOISE)
    put(folder, "odd.jpg", saved(blocks(3), "MPO", save_all=True, append_images=[preview], quality=100, subsampling=0))
    with caplog.at_level(logging.WARNING):
        found = np.asarray(opened(folder)[1]["image"], float)
    assert np.abs(found - blocks(3)).max() <= 1
    assert f"{folder}/odd.jpg holds several images (MPO); its main image is used" in caplog.text
