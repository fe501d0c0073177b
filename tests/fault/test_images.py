"""Odd pictures that are refused: by file and row, at once, before a model is read, and without taking memory."""
from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from odd_images import (
    DEEP,
    NOISE,
    black_png,
    chunk,
    cut,
    deep_png,
    frames,
    huge_bmp,
    huge_gif,
    huge_jpeg,
    huge_webp,
    opened,
    png_with,
    put,
    saved,
    sparse,
    with_tag,
    without_adobe,
    zeros_from_half,
    zipped_zeros,
)
from PIL import Image

from ms_diffsynth.data import dataset as dataset_module, image_size, read_image
from ms_diffsynth.errors import DataError

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("not_for_ever"),
              pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]

WHITE_IS_ZERO, BITS = 262, 258  # tags of TIFF: the kind of gray, bits of a pixel


def passes_verify():
    content = cut("JPEG", 0.9, quality=95)
    Image.open(io.BytesIO(content)).verify()
    return content


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # relative: the name of a socket has 107 bytes at most


CUT = ("damaged or cut short", "Replace it, or remove its row")
STILL = ("one still image", "Save the frame you mean as PNG")
REGULAR = ("expected a regular file", "Name a file, or remove it")

# file name -> its bytes, or what makes it at a path; then what the message says beside row and file
REFUSED = {
    "zero.jpg": (b"", "zero bytes", "Copy or download it again"),
    "text.jpg": (b"a cat on a mat\n", "not an image (it begins with b'a cat on a m", "Convert it, or replace it"),
    "page.png": (b"<!DOCTYPE html><h1>404</h1>", "not an image", "<!DOCTYPE ht", "replace it"),
    "heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(99), "not an image", "ftypheic", "expected JPEG, PNG", "Convert it"),
    "net.ppm": (b"P6 16 16 255\n" + bytes(768), "not an image", "Convert it"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", "not an image", "Convert it"),
    "cut.jpg": (cut("JPEG"), *CUT),
    "cut-progressive.jpg": (cut("JPEG", progressive=True), *CUT),
    "passes-verify.jpg": (passes_verify(), "its end is missing", *CUT),
    "preview.jpg": (cut("JPEG", 0.9, exif=b"Exif\0\0" + saved(NOISE[:9, :9], "JPEG")), "its end is missing", *CUT),
    "zeros.jpg": (zeros_from_half("JPEG"), "its end is missing", *CUT),  # as a download that was never finished
    "cut.png": (cut("PNG"), *CUT),
    "cut-by-13.png": (saved(NOISE)[:-13], "its end is missing", *CUT),
    "zeros.png": (zeros_from_half("PNG"), *CUT),
    "cut.webp": (cut("WEBP"), *CUT),
    "cut-by-1.webp": (saved(NOISE, "WEBP", lossless=True)[:-1], *CUT),
    "cut.gif": (cut("GIF"), *CUT),
    "cut.tif": (cut("TIFF"), *CUT),
    "cut.bmp": (cut("BMP"), *CUT),
    "float.tif": (saved(NOISE[..., 0] / np.float32(255), "TIFF"), "mode F (32 bits", "Convert it to 8-bit PNG"),
    "int32.tif": (saved(NOISE[..., 0].astype(np.int32), "TIFF"), "mode I (32 bits", "Convert it to 8-bit PNG"),
    "lab.tif": (saved(NOISE, "TIFF", "LAB"), "mode LAB (Lab colour)", "Convert it to 8-bit PNG"),
    "12-bit.tif": (with_tag(saved(DEEP[..., 0], "TIFF"), BITS, 16, 12), "(12 bits per pixel)", "Convert it"),
    "negative.tif": (with_tag(saved(DEEP[..., 0], "TIFF"), WHITE_IS_ZERO, 1, 0), "16 bits with 0 for white",
                     "Convert it"),
    "ink-or-paper.jpg": (without_adobe(saved(Image.new("CMYK", (32, 32), 9), "JPEG")), "without the Adobe marker",
                         "Convert it"),
    "16-bit-key.png": (deep_png(DEEP[..., :3], chunk(b"tRNS", DEEP[0, 0, :3].astype(">u2").tobytes())),
                       "16 bits with a transparent colour", "Convert it"),
    "animated.gif": (frames("GIF", 3), "3 frames", *STILL),
    "animated.webp": (frames("WEBP"), "2 frames", *STILL),
    "animated.png": (frames("PNG"), "2 frames", *STILL),
    "pages.tif": (frames("TIFF"), "2 frames or pages", *STILL),
    "1x1.png": (saved(NOISE[:1, :1]), "is 1x1 pixels", "at least 16 on each side", "Replace it"),
    "1x10000.png": (saved(np.zeros((10000, 1), np.uint8)), "is 1x10000 pixels", "at least 16", "remove it"),
    "3x5.jpg": (saved(NOISE[:5, :3], "JPEG"), "is 3x5 pixels", "at least 16"),
    "16x400.png": (saved(np.zeros((400, 16), np.uint8)), "is 16x400 pixels", "longer than 20:1", "Crop it"),
    "pipe.png": (os.mkfifo, "is a named pipe", *REGULAR),
    "folder.png": (Path.mkdir, "is a folder", *REGULAR),
    "socket.png": (a_socket, "cannot be opened", "Make it a readable regular file"),
    "zero-device.png": (lambda path: path.symlink_to("/dev/zero"), "leads to /dev/zero", "Move the file"),
    "loop.png": (lambda path: path.symlink_to(path), "cannot be opened", "Make it a readable regular file"),
    "dangling.png": (lambda path: path.symlink_to("gone.png"), "does not exist", "Put the file there"),
    "absent.png": (lambda path: None, "does not exist", "Put the file there, or correct its name"),
}
DECODED = {"cut.gif", "cut.tif", "cut.bmp"}  # formats that are seldom in a data set
PIXELS = "expected at most 64 million", "Make the image smaller"
TEXT = "too large when unpacked", "expected at most a megabyte", "Save the image again without metadata"
BOMBS = {
    "30000.png": (black_png(30000), "900 million pixels", *PIXELS),
    "13000.png": (black_png(13000), "13000x13000 = 169 million pixels", *PIXELS),
    "8001.png": (black_png(8001), "8001x8001 = 64 million pixels", *PIXELS),
    "16383.webp": (huge_webp(16383), "268 million pixels", *PIXELS),
    "10000.webp": (huge_webp(10000), "100 million pixels", *PIXELS),
    "65000.jpg": (huge_jpeg(), "4225 million pixels", *PIXELS),
    "50000.bmp": (huge_bmp(), "2500 million pixels", *PIXELS),
    "65535.gif": (huge_gif(), "4295 million pixels", *PIXELS),
    "text.png": (png_with(chunk(b"zTXt", b"Comment\0\0" + zipped_zeros(300 << 20))), *TEXT),
    "itext.png": (png_with(chunk(b"iTXt", b"c\0\1\0\0\0" + zipped_zeros(300 << 20))), *TEXT),
    "profile.png": (png_with(chunk(b"iCCP", b"p\0\0" + zipped_zeros(300 << 20))), *TEXT),
    "1-tb.jpg": (lambda path: sparse(path, saved(NOISE, "JPEG"), 1 << 40), "1099511627776 bytes", "at most 512000000"),
    "1-tb.webp": (lambda path: sparse(path, saved(NOISE, "WEBP"), 1 << 40), "1099511627776 bytes", "image smaller"),
    "20-mb.jpg": (lambda path: sparse(path, cut("JPEG"), 20 << 20), "its end is missing", *CUT),
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


def refused(call, *words):
    """The call raises a DataError of these words in under a second."""
    start = time.thread_time()
    with pytest.raises(DataError) as caught:
        call()
    assert time.thread_time() - start < 1
    assert all(word in str(caught.value) for word in words), (str(caught.value), words)


@pytest.mark.parametrize("name", [*REFUSED, *BOMBS])
def test_refused_by_row_before_any_model_is_read(train, folder, name, monkeypatch):
    make, *words = (REFUSED | BOMBS)[name]
    put(folder, name, make)
    decoded, decoder = [], Image._getdecoder
    monkeypatch.setattr(Image, "_getdecoder", lambda *args: decoded.append(args) or decoder(*args))
    code, err, seconds = train(folder)
    assert code == 65 and f"DataError: 1 of 2 rows of {folder}/metadata.csv cannot be used" in err, err
    assert f"row 2 (line 3): image='{name}': " in err and all(word in err for word in words), err
    assert seconds < 1 and (not decoded or name in DECODED)
    for read in (image_size, read_image):
        refused(lambda read=read: read(str(folder / name)), str(folder / name))


def test_bombs_take_no_memory(folder, python):
    """In a process of its own: what a process has taken once cannot be told from what it takes now."""
    for name, (make, *_) in BOMBS.items():
        put(folder, name, make)
    done = python("-c", MEASURE, folder / "good.png", *(folder / name for name in BOMBS))
    assert done.returncode == 0, done.stderr
    grown = [int(line) for line in done.stdout.split()]
    assert len(grown) == len(BOMBS) and max(grown) < 100_000, dict(zip(BOMBS, grown))  # KiB


MEASURE = """
import resource, sys
from ms_diffsynth.data import image_size, read_image
from ms_diffsynth.errors import DataError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = read_image(sys.argv[1]) and peak()
for path in sys.argv[2:]:
    for read in (image_size, read_image):
        try:
            read(path)
        except DataError:
            continue
        sys.exit(f"{path} was read")
    sys.stdout.write(f"{peak() - before}\\n")
"""


# ---- what happens between the scan and the reading

REPLACED = {
    "gone": (lambda path: None, "does not exist"),
    "pipe": (os.mkfifo, "is a named pipe", *REGULAR),
    "folder": (Path.mkdir, "is a folder", *REGULAR),
    "empty": (b"", "zero bytes"),
    "cut": (cut("PNG"), *CUT),
    "link out": (lambda path: path.symlink_to("/etc/hostname"), "leads to /etc/hostname", "Move the file"),
    "bomb": (black_png(13000), "169 million pixels", *PIXELS),
    "damaged": (saved(NOISE)[:200] + bytes(100) + saved(NOISE)[300:], *CUT),
}


@pytest.mark.parametrize("change", REPLACED)
def test_a_picture_that_changed_after_the_scan(folder, change):
    make, *words = REPLACED[change]
    put(folder, "odd.png", saved(NOISE))
    dataset = opened(folder)
    (folder / "odd.png").unlink()
    put(folder, "odd.png", make)
    refused(lambda: dataset[1], f"{folder}/metadata.csv row 2 (line 3), image='odd.png': ", *words)
    assert np.array_equal(dataset[0]["image"], NOISE)


def test_another_picture_after_the_scan_is_read_as_it_is(folder):
    put(folder, "odd.png", saved(NOISE))
    dataset = opened(folder)
    put(folder, "odd.png", saved(NOISE[:20, ::-1]))
    assert np.array_equal(dataset[1]["image"], NOISE[:20, ::-1])


def test_damage_that_only_decoding_shows_names_the_row(folder, monkeypatch):
    content = bytearray(saved(NOISE))
    content[len(content) // 2] ^= 1
    put(folder, "odd.png", bytes(content))
    refused(lambda: opened(folder), "row 2 (line 3): image='odd.png': ", *CUT)  # few are decoded by the check
    monkeypatch.setattr(dataset_module, "DECODED_AT_ONCE", 0)
    refused(lambda: opened(folder)[1], "row 2 (line 3), image='odd.png': ", *CUT)
