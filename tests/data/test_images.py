"""Reading pictures: every kind that is refused, and what the others turn into."""
from __future__ import annotations

import io
import logging
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from ms_diffsynth.data import grid, image_size, read_image, to_pil, to_pixels
from ms_diffsynth.data.paths import open_regular
from ms_diffsynth.errors import DataError


def picture(width=48, height=32):
    """A smooth picture without symmetry, so that a wrong turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 5 % 256, y * 7 % 256, (x + 2 * y) % 256], 2).astype(np.uint8))


def refused(path, *words, read=read_image):
    with pytest.raises(DataError) as caught:
        read(str(path))
    for word in (str(path), *words):
        assert word in str(caught.value)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# ---- files that are refused: the message names value, place and remedy

@pytest.mark.parametrize("read", [read_image, image_size])
class TestRefused:
    def test_missing(self, tmp_path, read):
        refused(tmp_path / "no.png", "does not exist", "Put the file there", read=read)

    def test_zero_bytes(self, tmp_path, read):
        (tmp_path / "empty.jpg").touch()
        refused(tmp_path / "empty.jpg", "zero bytes", "download it again", read=read)

    def test_text_named_jpg(self, tmp_path, read):
        (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
        refused(tmp_path / "page.jpg", "not an image", "<html>", "JPEG, PNG", "replace it", read=read)

    def test_other_format(self, tmp_path, read):
        picture().save(tmp_path / "a.ppm")
        refused(tmp_path / "a.ppm", "not an image", "Convert it", read=read)

    def test_too_small(self, tmp_path, read):
        Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
        refused(tmp_path / "dot.png", "1x1", "at least 16", "Replace it", read=read)

    def test_too_long(self, tmp_path, read):
        Image.new("RGB", (400, 19)).save(tmp_path / "line.png")
        refused(tmp_path / "line.png", "400x19", "20:1", "Crop it", read=read)

    def test_animated_gif(self, tmp_path, read):
        picture().save(tmp_path / "a.gif", save_all=True, append_images=[picture().rotate(90), picture().rotate(180)])
        refused(tmp_path / "a.gif", "3 frames", "one still image", "Save the frame", read=read)

    def test_animated_png(self, tmp_path, read):
        picture().save(tmp_path / "a.png", save_all=True, append_images=[picture().rotate(90)])
        refused(tmp_path / "a.png", "2 frames", read=read)

    def test_tiff_pages(self, tmp_path, read):
        picture().save(tmp_path / "a.tif", save_all=True, append_images=[picture()])
        refused(tmp_path / "a.tif", "2 frames or pages", read=read)

    def test_float(self, tmp_path, read):
        Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "f.tif")
        refused(tmp_path / "f.tif", "mode F", "32 bits", "Convert it", read=read)

    def test_32_bit_integers(self, tmp_path, read):
        Image.fromarray(np.full((20, 20), 70000, np.int32)).save(tmp_path / "i.tif")
        refused(tmp_path / "i.tif", "mode I", "Convert it", read=read)

    def test_folder(self, tmp_path, read):
        (tmp_path / "a.png").mkdir()
        refused(tmp_path / "a.png", "a folder", "regular file", read=read)

    def test_named_pipe_does_not_block(self, tmp_path, read):
        os.mkfifo(tmp_path / "pipe.png")
        refused(tmp_path / "pipe.png", "a named pipe", "regular file", read=read)  # else it would wait for ever

    def test_device(self, tmp_path, read):
        refused("/dev/zero", "a device", "regular file", read=read)

    def test_symlink_loop(self, tmp_path, read):
        (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
        refused(tmp_path / "a.png", "cannot be opened", "regular file", read=read)

    @pytest.mark.parametrize("side", [30000, 8100])
    def test_huge_is_refused_from_the_header(self, tmp_path, read, side):
        # The rows are compressed one by one: the test itself must not need the memory that it forbids.
        squeeze, row = zlib.compressobj(9), bytes(1 + (side + 7) // 8)
        body = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
        head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        path = tmp_path / "huge.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
        refused(path, f"{round(side * side / 1e6)} million", "at most 64 million", "smaller", read=read)
        assert time.thread_time() - start < 0.5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_truncated_is_refused_when_decoded(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(content[:len(content) // 2])
    refused(path, "damaged or cut short", "Replace it")


def test_open_regular_gives_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with open_regular(str(tmp_path / "a")) as file:
        assert file.read() == b"abc"


# ---- orientation

@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 100} if suffix == "jpg" else {"lossless": True}))
    expected = ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")).convert("RGB")
    result = read_image(str(tmp_path / f"a.{suffix}"))
    assert image_size(str(tmp_path / f"a.{suffix}")) == result.size == ((48, 32) if orientation < 5 else (32, 48))
    assert np.array_equal(result, expected)
    assert ImageOps.exif_transpose(result).size == result.size  # it cannot be turned twice
    # Where the pixel of the stored corner (0, 0) has to lie in the upright picture, by the EXIF standard.
    w, h = result.size
    corner = {1: (0, 0), 2: (w - 1, 0), 3: (w - 1, h - 1), 4: (0, h - 1), 5: (0, 0), 6: (w - 1, 0), 7: (w - 1, h - 1),
              8: (0, h - 1)}[orientation]
    assert np.abs(np.subtract(result.getpixel(corner), stored.getpixel((0, 0)), dtype=int)).max() <= 12


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = io.BytesIO()
    picture().save(plain, "PNG")
    body = plain.getvalue()
    path = tmp_path / "a.png"
    path.write_bytes(body[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + body[-12:])
    assert image_size(str(path)) == read_image(str(path)).size == (32, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12", b"Exif\0\0rubbish", 9])
def test_broken_exif_is_ignored_with_a_warning(tmp_path, caplog, exif):
    if isinstance(exif, int):
        tags = Image.Exif()
        tags[0x0112] = exif
        exif = tags
    path = str(tmp_path / "a.jpg")
    picture().save(path, exif=exif)
    with caplog.at_level(logging.WARNING):
        assert image_size(path) == read_image(path).size == (48, 32)
    assert [path in r.message and "broken EXIF" in r.message for r in caplog.records] == [True]  # once, not twice


def test_telephone_photograph_gives_its_main_picture(tmp_path, caplog):
    path = str(tmp_path / "a.jpg")
    picture().save(path, "MPO", save_all=True, append_images=[picture(24, 16)])
    with caplog.at_level(logging.WARNING):
        assert read_image(path).size == (48, 32)
    assert "MPO" in caplog.text and path in caplog.text


# ---- modes

def converted(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    result = read_image(str(tmp_path / name))
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_is_scaled(tmp_path, name):
    values = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    values[0, 0] = 65535
    result = converted(tmp_path, Image.fromarray(values), name)
    assert np.abs(result - (values / 257)[..., None]).max() <= 0.5
    assert result[0, 0, 0] == 255


def test_16_bit_rgb(tmp_path):
    values = np.random.default_rng(1).integers(0, 65536, (20, 20, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
                                     + chunk(b"IEND", b""))
    assert np.abs(np.asarray(read_image(str(tmp_path / "a.png"))) - values / 257).max() <= 1


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert np.abs(converted(tmp_path, cmyk, "a.jpg", quality=100) - [255, 0, 0]).max() <= 2  # as Adobe writes: inverted
    assert np.abs(converted(tmp_path, cmyk, "a.tif") - [255, 0, 0]).max() <= 1


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


def test_palette(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert (converted(tmp_path, image) == [10, 200, 30]).all()
    assert (converted(tmp_path, image, transparency=1) == 255).all()  # a transparent palette entry lies over white


@pytest.mark.parametrize("image, colour", [
    (Image.new("RGBA", (20, 20), (200, 0, 0, 0)), (255, 255, 255)),
    (Image.new("RGBA", (20, 20), (200, 0, 100, 128)), (227, 127, 177)),
    (Image.new("LA", (20, 20), (0, 64)), (191, 191, 191)),
    (Image.new("L", (20, 20), 77), (77, 77, 77)),
    (Image.new("1", (20, 20), 1), (255, 255, 255)),
])
def test_other_modes(tmp_path, image, colour):
    assert np.abs(converted(tmp_path, image) - colour).max() <= 1


def test_transparent_colour_of_rgb_lies_over_white(tmp_path):
    assert (converted(tmp_path, Image.new("RGB", (20, 20), (9, 9, 9)), transparency=(9, 9, 9)) == 255).all()


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
        assert len(y) == 64 * 48 and np.ptp(y) == 47 and np.ptp(x) == 63
        places.append((y.min(), x.min()))
    assert places[0][0] == places[1][0] < places[2][0] - 48 and places[0][1] == places[2][1] < places[1][1] - 64
    right = sheet.shape[1] - (places[1][1] + 64)
    assert places[0][1] == right  # even margins
    for edge in (sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]):
        assert (edge == 255).all()
    above, below = sheet[:places[0][0]], sheet[places[2][0] + 48:]
    assert (above < 200).any() and (below < 200).any()  # caption and titles are there


def test_grid_breaks_a_list_into_rows():
    pictures = [Image.new("RGB", (20, 20), (0, 0, 0))] * 5
    assert grid(pictures).height < grid(pictures, columns=2).height
    assert (np.asarray(grid(pictures, columns=2)) == 0).all(2).sum() == 5 * 400


def test_grid_refuses():
    with pytest.raises(DataError, match="2 captions were given for a grid of 1"):
        grid([Image.new("RGB", (20, 20))], captions=["a", "b"])
    with pytest.raises(DataError, match="empty row"):
        grid([])
