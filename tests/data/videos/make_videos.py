"""Writes the films of the tests, with PyAV 18.1.0 (FFmpeg 8.0):  python tests/data/videos/make_videos.py

Frame k of a film is gray, of brightness 8 k (of long.mkv: 3 k), so that a test sees which frames it got; turned.mp4 and
flat.mp4 are white in their left upper quarter. All are made here from nothing.
"""
from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HERE = Path(__file__).parent


def gray(values, height=48, width=64):
    return [np.full((height, width, 3), value, np.uint8) for value in values]


def film(name, frames, rate, codec="libx264", times=None, turn=None, ratio=None, pixels="yuv420p", options=None):
    """``times``: of the frames, in milliseconds."""
    with av.open(str(HERE / name), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pixels, {"crf": "8", "threads": "1"}
        if ratio:
            stream.codec_context.sample_aspect_ratio = Fraction(ratio)
        if turn:
            stream.set_display_rotation(turn)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, pixel in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixel, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main():
    corner = np.zeros((48, 64, 3), np.uint8)
    corner[:24, :32] = 255
    film("even.mp4", gray(8 * k for k in range(30)), 30)
    film("variable.mp4", gray(8 * k for k in range(10)), 30, times=(0, 40, 80, 120, 500, 540, 580, 1000, 1040, 1080))
    film("turned.mp4", [corner] * 9, 16, turn=-90)
    film("flat.mp4", [corner] * 9, 16, ratio="2/1")
    film("film.webm", gray(8 * k for k in range(24)), 24, codec="libvpx-vp9")
    film("long.mkv", gray((3 * k for k in range(80)), 16, 16), 10)
    film("whole.mp4", [np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8) for k in range(20)], 16,
         options={"movflags": "faststart"})
    content = (HERE / "whole.mp4").read_bytes()
    (HERE / "whole.mp4").unlink()
    (HERE / "cut.mp4").write_bytes(content[:len(content) * 6 // 10])
    with av.open(str(HERE / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(HERE / "empty.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()


if __name__ == "__main__":
    main()
