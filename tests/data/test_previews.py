"""Videos as files to look at: every frame is there, at its time, with what is said of it."""
from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
from films import needs_av
from PIL import Image, ImageSequence

from ms_diffsynth.data.previews import gif_bytes, mp4_bytes, smaller, strip, video_grid, webp_bytes, webp_text
from ms_diffsynth.data.video import film_of, frames_at


def moving(frames=5, height=32, width=48):
    """A bright square on a coloured ground that moves to the right."""
    video = np.full((frames, height, width, 3), (40, 90, 160), np.uint8)
    for k in range(frames):
        video[k, 8:24, 2 * k:2 * k + 16] = (230, 200, 40)
    return video


@pytest.mark.parametrize("fps, frames", [(16, 17), (24, 9), (1000 / 30, 4)])
def test_an_animated_webp(fps, frames):
    video = moving(frames)
    content = webp_bytes(video, fps, "a cat \u732b, seed 3")
    image = Image.open(io.BytesIO(content))
    found, delays = [], []
    for frame in ImageSequence.Iterator(image):
        found.append(np.asarray(frame.convert("RGB")).astype(int))
        delays.append(frame.info["duration"])
    assert len(found) == frames and image.info["loop"] == 0 and webp_text(content) == "a cat \u732b, seed 3"
    assert sum(delays) == round(1000 * frames / fps) and max(delays) - min(delays) <= 1
    assert np.abs(np.stack(found) - video).mean() < 6
    assert webp_text(webp_bytes(video, fps)) == "" and Image.open(io.BytesIO(webp_bytes(video[:1], fps))).n_frames == 1


def test_a_gif():
    image = Image.open(io.BytesIO(gif_bytes(moving(), 10)))
    frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(image)]
    assert len(frames) == 5 and np.abs(np.stack(frames) - moving()).mean() < 4


@needs_av
@pytest.mark.parametrize("size, fps", [((32, 48), 16), ((31, 47), 24)])
def test_an_mp4(tmp_path, size, fps):
    import av

    video = moving(9, *size)
    (tmp_path / "a.mp4").write_bytes(mp4_bytes(video, fps, "a cat, seed 3"))
    film = film_of(str(tmp_path / "a.mp4"))
    assert (film.frames, film.height, film.width) == (9, size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert film.seconds == pytest.approx(9 / fps)
    frames = frames_at(str(tmp_path / "a.mp4"), [Fraction(k, fps) for k in range(9)], Fraction(fps))
    found = np.stack([np.asarray(frame)[:size[0], :size[1]] for frame in frames]).astype(int)
    assert np.abs(found - video).mean() < 6 and np.abs(found[:, 28:31, :8] - video[:, 28:31, :8]).max() < 12  # colours
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == "a cat, seed 3"


def test_a_sheet_of_videos_of_different_lengths():
    one, other = moving(5, 160, 240), moving(3, 160, 240)
    sheet = video_grid([[one, other]], titles=["one", "other"])
    assert sheet.dtype == np.uint8 and len(sheet) == 5
    assert (sheet[3][:, 260:] == sheet[4][:, 260:]).all() and (sheet[3][:, :230] != sheet[4][:, :230]).any()
    assert (video_grid([[one], [other]], captions=["before", "after"]).shape[1] > sheet.shape[1])


def test_videos_are_made_smaller_and_put_into_a_strip():
    assert smaller(moving(3, 512, 1024)).shape == (3, 128, 256, 3) and smaller(moving(3)).shape == (3, 32, 48, 3)
    assert strip(moving(9)).size == (5 * 48 + 4, 32) and strip(moving(2)).size == (2 * 48 + 1, 32)
