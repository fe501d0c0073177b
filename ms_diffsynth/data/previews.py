"""Videos as files that are looked at: animated WebP by Pillow, MP4 (H.264) by PyAV, GIF for what knows nothing else.

A video is uint8 [F, H, W, 3]. What a file says of itself stands where viewers of images look for it: EXIF's UserComment
of a WebP, the comment of an MP4.
"""
from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image

from .images import grid, side_by_side
from .video import library

CELL = 256  # pixels, the longer side of a video in a sheet: a sheet of four has a few hundred kB
_EXIF, _COMMENT = 0x8769, 0x9286  # tags
_QUALITY, _CRF = 80, "18"


def webp_bytes(video: np.ndarray, fps: float, text: str = "") -> bytes:
    """An animated WebP that is shown again and again; of one frame a still image."""
    exif = Image.Exif()
    if text:
        exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return _animated(video, fps, "WEBP", quality=_QUALITY, method=4, exif=exif)


def webp_text(content: bytes) -> str:
    """What `webp_bytes` was given as text."""
    comment = Image.open(io.BytesIO(content)).getexif().get_ifd(_EXIF).get(_COMMENT, b"")
    return comment.removeprefix(b"UNICODE\0").decode("utf-16-be")


def gif_bytes(video: np.ndarray, fps: float) -> bytes:
    """An animated GIF, of 256 colours a frame."""
    return _animated(video, fps, "GIF", disposal=1)


def _animated(video: np.ndarray, fps: float, kind: str, **how: object) -> bytes:
    frames, file = [Image.fromarray(frame) for frame in video], io.BytesIO()
    ends = [round(1000 * (k + 1) / fps) for k in range(len(frames))]  # in whole milliseconds, without a drift
    delays = [end - before for before, end in zip([0, *ends], ends)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=delays, loop=0, **how)
    return file.getvalue()


def mp4_bytes(video: np.ndarray, fps: float, text: str = "") -> bytes:
    """An MP4 that browsers play: H.264 in 4:2:0, BT.709, an odd side made even by its last row or column twice.

    Raises: ConfigError without PyAV.
    """
    av, file = library(), io.BytesIO()
    frames = np.pad(video, [(0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)], mode="edge")
    with av.open(file, "w", format="mp4") as container:
        if text:
            container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options, codec = {"crf": _CRF}, stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1  # BT.709, 16 to 235
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709",
                                                         dst_color_range="MPEG")))
        container.mux(stream.encode())
    return file.getvalue()


def has_mp4() -> bool:
    """Whether PyAV is here, by which `mp4_bytes` writes."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def smaller(video: np.ndarray, side: int = CELL) -> np.ndarray:
    """A video with no side longer than ``side`` pixels; uint8 [F, h, w, 3]."""
    height, width = video.shape[1:3]
    scale = side / max(height, width)
    if scale >= 1:
        return video
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in video])


def video_grid(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str] | None = None,
               titles: Sequence[str] | None = None) -> np.ndarray:
    """A sheet of videos that play together, as `images.grid`; a shorter one stays at its last frame.

    Shapes: each uint8 [f, h, w, 3] -> uint8 [F, H, W, 3], F the longest.
    """
    small = [[smaller(video) for video in row] for row in rows]
    longest = max(len(video) for row in small for video in row)
    return np.stack([np.asarray(grid(
        [[Image.fromarray(video[min(k, len(video) - 1)]) for video in row] for row in small],
        captions=captions, titles=titles)) for k in range(longest)])


def strip(video: np.ndarray, count: int = 5) -> Image.Image:
    """Some frames of a video beside each other, the first and the last among them, for what shows no video."""
    chosen = np.unique(np.linspace(0, len(video) - 1, count).round().astype(int))
    return side_by_side([Image.fromarray(video[k]) for k in chosen], min(video.shape[1], CELL))
