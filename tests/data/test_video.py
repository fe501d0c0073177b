"""Reading films: which frames, at what times, upright; and everything that is no film."""
from __future__ import annotations

import builtins
from fractions import Fraction

import numpy as np
import pytest
from films import VIDEOS, animation, brightness, film, folder_of_frames, needs_av
from PIL import Image

from ms_diffsynth.data.video import film_of, frames_at, to_frames, to_pixels
from ms_diffsynth.errors import ConfigError, DataError

SIXTEEN = Fraction(16)


def at(path, times):
    return list(frames_at(path, times, SIXTEEN))


def numbers(path, times, step=8):
    """Which frames of a film of `make_videos.py` were given."""
    return [round(value / step) for value in brightness(at(path, times))]


def sixteenths(count, start=0):
    return [start + Fraction(k, 16) for k in range(count)]


@needs_av
@pytest.mark.parametrize("name, width, height, frames, seconds, is_even", [
    ("even.mp4", 64, 48, 30, 1.0, True), ("variable.mp4", 64, 48, 10, 1.2, False),
    ("turned.mp4", 48, 64, 9, 9 / 16, True),
    ("flat.mp4", 128, 48, 9, 9 / 16, True), ("film.webm", 64, 48, 24, 1.0, True), ("long.mkv", 16, 16, 80, 8.0, True)])
def test_what_a_film_is(name, width, height, frames, seconds, is_even):
    found = film_of(film(name))
    assert (found.width, found.height, found.frames, found.is_even) == (width, height, frames, is_even)
    assert found.seconds == pytest.approx(seconds, abs=2e-3) and found.rate == pytest.approx(frames / seconds, rel=2e-3)


@needs_av
def test_frames_are_those_nearest_in_time():
    nearest = [min(range(30), key=lambda k: (abs(Fraction(k, 30) - time), k)) for time in sixteenths(16)]
    assert nearest[:5] == [0, 2, 4, 6, 7]
    assert numbers(film("even.mp4"), sixteenths(16)) == nearest
    # its times are whole milliseconds; of 24 a second, 3 of 4 frames are used
    assert numbers(film("film.webm"), sixteenths(16))[:9] == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    # 0, 40, 80, 120, 500, 540, 580, 1000 ...: a frame stays until one is nearer
    assert numbers(film("variable.mp4"), [Fraction(k, 10) for k in range(11)]) == [0, 2, 3, 3, 4, 4, 6, 6, 7, 7, 7]


@needs_av
def test_frames_far_from_the_beginning_are_found_by_the_index():
    whole = numbers(film("long.mkv"), [Fraction(k, 10) for k in range(80)], 3)
    assert whole == list(range(80))
    assert numbers(film("long.mkv"), [6 + Fraction(k, 10) for k in range(15)], 3) == list(range(60, 75))


@needs_av
def test_a_film_is_turned_and_its_pixels_made_square():
    for name, size, white in (("turned.mp4", (48, 64), (43, 5)), ("flat.mp4", (128, 48), (5, 5))):
        image = at(film(name), [Fraction(0)])[0]
        corners = [(5, 5), (size[0] - 5, 5), (5, size[1] - 5), (size[0] - 5, size[1] - 5)]
        assert image.size == size and [image.getpixel(c)[0] > 200 for c in corners] == [c == white for c in corners]


@pytest.mark.fault
@needs_av
@pytest.mark.parametrize("name, says", [
    ("cut.mp4", "is cut short: 11 of 20 frames are there"), ("sound.mp4", "has no pictures (audio only)"),
    ("empty.mp4", "has no pictures (nothing only)")])
def test_a_file_without_the_film_it_should_hold(name, says):
    with pytest.raises(DataError) as raised:
        film_of(film(name))
    assert says in str(raised.value) and film(name) in str(raised.value)


@pytest.mark.fault
@needs_av
@pytest.mark.parametrize("name", ["even.mp4", "film.webm", "long.mkv"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_film_that_is_cut_short(tmp_path, name, share):
    content = (VIDEOS / name).read_bytes()
    (tmp_path / name).write_bytes(content[:int(len(content) * share)])
    with pytest.raises(DataError, match=r"is cut short|cannot be decoded|has zero frames|has no pictures"):
        film_of(str(tmp_path / name))


@pytest.mark.fault
@needs_av
@pytest.mark.parametrize("content, says", [(b"", "zero bytes"), (b"x" * 5000, "cannot be decoded"),
                                           (b"<html>not found</html>", "cannot be decoded")])
def test_what_is_no_film(tmp_path, content, says):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=says):
        film_of(str(tmp_path / "a.mp4"))


@pytest.mark.fault
@needs_av
def test_damage_in_the_middle_shows_when_frames_are_read(tmp_path):
    content = bytearray((VIDEOS / "long.mkv").read_bytes())
    for k in range(1200, len(content) - 600):
        content[k] ^= 0x5A
    (tmp_path / "long.mkv").write_bytes(content)
    with pytest.raises(DataError):
        film_of(str(tmp_path / "long.mkv"))
        at(str(tmp_path / "long.mkv"), [Fraction(k, 10) for k in range(80)])


@pytest.mark.fault
def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    load = builtins.__import__

    def without(name, *more):
        if name == "av":
            raise ImportError(name)
        return load(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pip install 'ms_diffsynth\[video\]'"):
        film_of(str(tmp_path / "a.mp4"))


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_by_its_delays(tmp_path, suffix):
    path = animation(tmp_path / f"a.{suffix}", range(0, 240, 8), 40)
    found = film_of(path)
    assert (found.width, found.height, found.frames, found.is_even) == (64, 48, 30, True)
    assert found.seconds == pytest.approx(1.2)
    assert [round(v / 8) for v in brightness(at(path, sixteenths(6)))] == [0, 2, 3, 5, 6, 8]  # of 25 a second
    uneven = film_of(animation(tmp_path / f"b.{suffix}", (0, 80, 160), [100, 500, 100]))
    assert uneven.seconds == pytest.approx(0.7) and not uneven.is_even
    assert film_of(animation(tmp_path / f"c.{suffix}", (0,))).frames == 1


@pytest.mark.fault
def test_an_animation_is_laid_over_white_and_cut_ones_are_refused(tmp_path):
    frames = [Image.new("RGBA", (64, 48), (0, 0, 0, 0)) for _ in range(3)]
    for k, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (10 * k, 0, 10 * k + 10, 10))
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=50)
    image = at(str(tmp_path / "a.png"), [Fraction(0)])[0]
    assert image.getpixel((5, 5)) == (255, 0, 0) and image.getpixel((40, 40)) == (255, 255, 255)
    path = animation(tmp_path / "b.gif", range(0, 240, 8))
    (tmp_path / "c.gif").write_bytes(open(path, "rb").read()[:-600])
    with pytest.raises(DataError, match=r"c\.gif cannot be decoded"):
        film_of(str(tmp_path / "c.gif"))


def test_a_folder_of_frames_has_no_rate_and_natural_order(tmp_path):
    path = folder_of_frames(tmp_path / "walk", range(0, 240, 12))
    found = film_of(path)
    assert found.frames == 20 and found.seconds is None and found.rate is None
    assert brightness(at(path, sixteenths(20))) == [float(v) for v in range(0, 240, 12)]  # 2.png before 10.png
    Image.new("RGB", (32, 32)).save(tmp_path / "walk/7.png")
    with pytest.raises(DataError, match=r"7\.png is 32x32 pixels, the first frame beside it 64x48"):
        film_of(path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="without images"):
        film_of(str(tmp_path / "none"))


def test_an_image_is_a_film_of_one_frame(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    assert film_of(str(tmp_path / "a.png")).frames == 1
    assert [image.getpixel((0, 0)) for image in at(str(tmp_path / "a.png"), [Fraction(0)])] == [(255, 0, 0)]
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="is not an image"):
        film_of(str(tmp_path / "b.png"))


def test_pixels_and_back():
    video = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    pixels = to_pixels(video)
    assert pixels.shape == (3, 5, 16, 24) and pixels.dtype == np.float32
    assert pixels[1, 4, 3, 2] == np.float32(video[4, 3, 2, 1]) / np.float32(127.5) - 1
    assert (to_frames(pixels) == video).all() and to_frames(np.full((3, 1, 2, 2), 7.0))[0, 0, 0, 0] == 255
    for wrong in (video[0], video.astype(np.float32)):
        with pytest.raises(DataError, match="expected uint8"):
            to_pixels(wrong)
    with pytest.raises(DataError, match="not finite"):
        to_frames(np.full((3, 1, 2, 2), np.nan))
    with pytest.raises(DataError, match="one video at a time"):
        to_frames(pixels[None])
