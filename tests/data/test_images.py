"""Reading images: profiles, modes, pixels, grids. Odd files, refused or read, are in tests/fault/test_images.py and
test_pixels.py.
"""
from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from odd_images import chunk
from PIL import Image, ImageCms

from ms_diffsynth.data import grid, image_size, read_image, to_pil, to_pixels
from ms_diffsynth.data.paths import open_regular
from ms_diffsynth.errors import DataError


def picture(width=48, height=32):
    """A smooth picture without symmetry, so that a wrong turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 5 % 256, y * 7 % 256, (x + 2 * y) % 256], 2).astype(np.uint8))


@pytest.mark.parametrize("read", [read_image, image_size])
def test_a_device_is_refused_and_not_read(read):
    with pytest.raises(DataError, match=r"/dev/zero is a device.*regular file"):
        read("/dev/zero")


def test_open_regular_gives_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with open_regular(str(tmp_path / "a")) as file:
        assert file.read() == b"abc"


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = io.BytesIO()
    picture().save(plain, "PNG")
    body = plain.getvalue()
    path = tmp_path / "a.png"
    path.write_bytes(body[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + body[-12:])
    assert image_size(str(path)) == read_image(str(path)).size == (32, 48)


# ---- modes

def converted(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    result = read_image(str(tmp_path / name))
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


def test_cmyk_goes_through_its_profile(tmp_path, monkeypatch):
    seen = []

    def profile_to_profile(image, source, target, outputMode):
        seen.append((image.mode, outputMode))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", profile_to_profile)
    result = converted(tmp_path, Image.new("CMYK", (20, 20)), "a.tif", icc_profile=b"profile")
    assert seen == [("CMYK", "RGB")] and (result == [1, 2, 3]).all()


def test_cmyk_with_a_broken_profile_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = converted(tmp_path, Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "a.tif", icc_profile=b"rubbish")
    assert np.abs(result - [255, 0, 0]).max() <= 1
    assert "broken colour profile" in caplog.text


def test_rgba_keeps_transparency_and_none_keeps_the_mode(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGBA", (20, 20), (200, 0, 0, 40)).save(path)
    assert read_image(path, "RGBA").getpixel((0, 0)) == (200, 0, 0, 40)
    Image.new("L", (20, 20), 5).save(path)
    assert read_image(path, "RGBA").getpixel((0, 0)) == (5, 5, 5, 255)
    assert read_image(path, None).mode == "L"


# ---- pixels

def test_pixels_there_and_back():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pixels = to_pixels(Image.fromarray(values))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    assert pixels.min() == -1 and pixels.max() == 1
    assert pixels[1, 0, 5] == np.float32(np.float32(5) / np.float32(127.5) - 1)
    assert np.array_equal(to_pil(pixels), values)
    assert np.asarray(to_pil(np.full((3, 16, 16), 7.0))).min() == 255  # clipped


def test_pixels_refuse():
    with pytest.raises(DataError, match=r"mode L.*expected RGB.*convert"):
        to_pixels(Image.new("L", (16, 16)))
    with pytest.raises(DataError, match=r"\(16, 16, 3\).*\[3, H, W\].*one image"):
        to_pil(np.zeros((16, 16, 3)))
    broken = np.zeros((3, 4, 4), np.float32)
    broken[0, 0, :2] = np.nan, np.inf
    with pytest.raises(DataError, match=r"2 of 48 pixel values are not finite.*float32"):
        to_pil(broken)


# ---- grid

def test_grid_holds_every_picture_whole_and_apart():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (120, 120, 0)]
    pictures = [Image.new("RGB", (64, 48), colour) for colour in colours]
    sheet = np.asarray(grid([pictures[:2], pictures[2:]], ["before", "after"], titles=["a cat " * 20, "a dog"]))
    places = []
    for colour in colours:
        y, x = np.nonzero((sheet == colour).all(2))
        assert len(y) == 128 * 96 and np.ptp(y) == 95 and np.ptp(x) == 127  # small images twice as large
        places.append((y.min(), x.min()))
    assert places[0][0] == places[1][0] < places[2][0] - 96 and places[0][1] == places[2][1] < places[1][1] - 128
    right = sheet.shape[1] - (places[1][1] + 128)
    assert places[0][1] == right  # even margins
    for edge in (sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]):
        assert (edge == 255).all()
    above, below = sheet[:places[0][0]], sheet[places[2][0] + 96:]
    assert (above < 200).any() and (below < 200).any()  # caption and titles are there


def test_grid_breaks_a_list_into_rows():
    pictures = [Image.new("RGB", (130, 20), (0, 0, 0))] * 5
    assert grid(pictures).height < grid(pictures, columns=2).height
    assert (np.asarray(grid(pictures, columns=2)) == 0).all(2).sum() == 5 * 130 * 20


def test_grid_refuses():
    with pytest.raises(DataError, match="2 captions were given for a grid of 1"):
        grid([Image.new("RGB", (20, 20))], captions=["a", "b"])
    with pytest.raises(DataError, match="empty row"):
        grid([])
