"""Reading films strictly: video files (by PyAV, extra [video]), animated GIF, WebP and PNG (by Pillow), and folders of
frames. A frame is known by its time, never by its number, so that files of a variable rate are read right.
"""
from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from ..errors import ConfigError, DataError
from .images import FORMATS, SUFFIXES, check_sides, image_size, read_image, to_rgb
from .paths import open_regular

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".wmv", ".flv")
FRAMES_SUFFIX = ".frames"  # of a folder whose images are the frames of one film
EXTRA = "Install the extra: pip install 'ms_diffsynth[video]'"
ANIMATED = ("GIF", "WEBP", "PNG")  # formats of Pillow that may have several frames
USUAL_DELAY = Fraction(1, 10)  # seconds, of a frame of a GIF that says 0: what browsers show
QUARTER = Fraction(1, 4)
FAR = 5  # seconds from the beginning of a file, beyond which a clip is looked for by its index of key frames


@dataclass(frozen=True)
class Film:
    """What a film is, as it is shown: upright, with square pixels.

    Attributes:
        width, height: pixels.
        frames: how many; 1 is a still image.
        seconds: how long it is. None of a folder of frames, whose rate is not known.
        is_even: whether its frames follow each other at one rate.
    """

    width: int
    height: int
    frames: int = 1
    seconds: float | None = 0.0
    is_even: bool = True

    @property
    def rate(self) -> float | None:
        """Frames a second on average; None of a still image and of a folder of frames."""
        return self.frames / self.seconds if self.seconds else None


def is_video(name: str) -> bool:
    """Whether a file is read by PyAV, by the end of its name."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def film_of(path: str) -> Film:
    """What a file, or a folder of frames, is. Of a video file all packets are read, and the first frame is decoded.

    Raises: DataError when it is not a film and not an image, has no frames, is cut short, or breaks a rule of
        `images.read_image` for its sides; ConfigError for a video file without PyAV.
    """
    if os.path.isdir(path):
        return _film_of_folder(path)
    if is_video(path):
        return _film_of_video(path)
    if (times := _delays(path)) is None:
        return Film(*image_size(path))
    with _animation(path) as image:
        unit = Fraction(1, 100 if image.format == "GIF" else 1000)  # of its delays
        return Film(*image.size, len(times), float(sum(times)), max(times) - min(times) <= unit)


def frames_at(path: str, times: Sequence[Fraction], rate: Fraction) -> Iterator[Image.Image]:
    """Frames of a film, upright, in RGB: for each of the times the frame that is nearest to it, the earlier of two.

    Args:
        times: seconds from the first frame, rising.
        rate: of a folder of frames, which does not say its own.

    Raises: DataError where a frame cannot be decoded, or the film has ended long before.
    """
    if os.path.isdir(path):
        found = ((k / rate, name) for k, name in enumerate(_names(path)))
        yield from (read_image(name) for name in _nearest(found, times))
    elif is_video(path):
        yield from _frames_of_video(path, times)
    elif (delays := _delays(path)) is None:
        yield from [read_image(path)] * len(times)
    else:
        starts = [sum(delays[:k], Fraction(0)) for k in range(len(delays))]
        with _animation(path) as image:
            frames = ((start, frame.convert("RGBA")) for start, frame in zip(starts, ImageSequence.Iterator(image)))
            yield from (to_rgb(frame, path) for frame in _nearest(frames, times))


def to_pixels(video: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1], computed as x / 127.5 - 1."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise DataError(f"a video of shape {video.shape} and dtype {video.dtype} was given; expected uint8 "
                        "[F, H, W, 3]. Convert it")
    pixels = video.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))


def to_frames(pixels: np.ndarray) -> np.ndarray:
    """float [3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]; values beyond are clipped. The inverse of `to_pixels`.

    Raises: DataError for another shape, and for values that are not finite.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 4 or pixels.shape[0] != 3:
        raise DataError(f"an array of shape {pixels.shape} was given; expected [3, F, H, W]. Pass one video at a time")
    pixels = pixels.astype(np.float32)
    if broken := int(np.size(pixels) - np.isfinite(pixels).sum()):
        raise DataError(f"{broken} of {pixels.size} pixel values are not finite; expected numbers in [-1, 1]. Decode "
                        "in float32, or use an earlier checkpoint: the weights may have diverged")
    found = np.clip(np.rint((pixels + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(found.transpose(1, 2, 3, 0))


def library() -> Any:
    """PyAV, whose log stays off: with it a decoder that is closed may wait for its threads, and they for Python.

    Raises: ConfigError where it is not installed.
    """
    try:
        import av
    except ImportError:
        raise ConfigError(f"video files ({', '.join(VIDEO_SUFFIXES)}) are read with PyAV, which is not installed. "
                          f"{EXTRA}; or save the frames of each film in a folder, NAME{FRAMES_SUFFIX}") from None
    return av


def _nearest(found: Iterator[tuple[Fraction, Any]], times: Sequence[Fraction]) -> Iterator[Any]:
    """For each time the nearest of what ``found`` gives with rising times of its own; the last for what is behind."""
    before, k = None, 0
    for time, frame in found:
        while k < len(times) and time >= times[k]:
            is_nearer = before is not None and times[k] - before[0] <= time - times[k]
            yield before[1] if is_nearer else frame
            k += 1
        if k == len(times):
            return
        before = time, frame
    if before is None:
        raise DataError("no frame can be decoded")
    for _ in times[k:]:
        yield before[1]


# -- folders of frames, and animations -------------------------------------------------------------------------------


def frame_files(folder: str) -> list[str]:
    """The names of the frames in a folder, in order: 2.png is before 10.png."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(names, key=lambda name: [int(part) if part.isdecimal() else part
                                           for part in re.split(r"(\d+)", name)])


def _names(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in frame_files(folder)]


def _film_of_folder(path: str) -> Film:
    names = _names(path)
    if not names:
        raise DataError(f"{path} is a folder without images; expected the frames of a film ({', '.join(SUFFIXES)}). "
                        "Put them there, or remove it")
    sizes = {name: image_size(name) for name in names}
    first = sizes[names[0]]
    if odd := next((name for name in names if sizes[name] != first), None):
        raise DataError("{} is {}x{} pixels, the first frame beside it {}x{}; expected frames of one size. Save them "
                        "anew".format(odd, *sizes[odd], *first))
    return Film(*first, len(names), None if len(names) > 1 else 0.0)


@contextmanager
def _animation(path: str) -> Iterator[Image.Image]:
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                yield image
        except DataError:
            raise
        except Exception as error:  # Pillow's parsers raise a dozen kinds of exception on damaged bytes
            raise DataError(f"{path} cannot be decoded ({error}); the file is damaged or cut short. Replace it, or "
                            "remove its row") from error


def _delays(path: str) -> tuple[Fraction, ...] | None:
    """How long each frame of an animation is shown, in seconds; None of a still image. Decodes all of it, once."""
    open_regular(path).close()
    status = os.stat(path)
    return _delays_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _delays_of(path: str, size: int, changed: int) -> tuple[Fraction, ...] | None:
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.format not in ANIMATED or getattr(image, "n_frames", 1) < 2:
                    return None
        except Exception:  # no image at all: `images.image_size` says what it is
            return None
    with _animation(path) as image:
        check_sides(path, *image.size)
        delays = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            delay = Fraction(frame.info.get("duration") or 0).limit_denominator(1000) / 1000
            delays.append(delay or USUAL_DELAY)
        return tuple(delays)


# -- video files -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream."""
    open_regular(path).close()  # what is no file, or empty
    av = library()
    try:
        with av.open(path, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not (s.disposition & av.stream.Disposition.attached_pic)]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams})
                raise DataError(f"{path} has no pictures ({' and '.join(kinds) or 'nothing'} only); expected a video. "
                                "Replace it, or remove its row")
            stream = streams[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        raise DataError(f"{path} cannot be decoded ({error.strerror or error}); the file is damaged, cut short or of a "
                        "kind that FFmpeg does not know. Replace it, or remove its row") from None


def _film_of_video(path: str) -> Film:
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise DataError(f"{path} has zero frames; expected a video. Replace it, or remove its row")
        width, height = _shown(first, stream)
    check_sides(path, width, height)
    with _opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        _refuse_cut(path, container, stream, packets)
        shown = [packet for packet in packets if not packet.is_discard]
        stamps = sorted(p.pts if p.pts is not None else p.dts for p in shown if p.pts is not None or p.dts is not None)
        if len(stamps) < len(shown) or len(stamps) < 2 or stamps[0] == stamps[-1]:  # a format without times
            return Film(width, height, len(shown), float(len(shown) / (stream.average_rate or 1)))
        gaps = np.diff(np.array(stamps, np.float64))
        whole = (stamps[-1] - stamps[0]) * stream.time_base * Fraction(len(stamps), len(stamps) - 1)
        unit = max(1.0, 0.0015 / float(stream.time_base))  # times in whole milliseconds are still even
        return Film(width, height, len(stamps), float(whole), bool(gaps.max() - gaps.min() <= unit))


def _refuse_cut(path: str, container: Any, stream: Any, packets: list[Any]) -> None:
    """Raises: DataError when less is there than the header says."""
    end = max((packet.pts for packet in packets if packet.pts is not None), default=0) * stream.time_base
    told = float(stream.duration * stream.time_base) if stream.duration else _tagged(stream) or (
        container.duration / 1e6 if container.duration and len(container.streams) == 1 else 0.0)
    missing = max(0, stream.frames - len(packets))
    if missing or told - float(end) > 0.25 + 2 / float(stream.average_rate or 1):  # a last frame is not its end
        there = f"{len(packets)} of {stream.frames} frames" if missing else f"{float(end):.1f} of {told:.1f} seconds"
        raise DataError(f"{path} is cut short: {there} are there. Copy or download it again, or remove its row")


def _tagged(stream: Any) -> float:
    """Seconds as Matroska's tag has them: 00:00:01.500000000."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1))) if match else 0.0


def _shown(frame: Any, stream: Any) -> tuple[int, int]:
    """Width and height at which a frame is shown: pixels made square, upright."""
    ratio = stream.sample_aspect_ratio or 1
    width, height = round(frame.width * ratio), frame.height
    return (height, width) if frame.rotation % 180 else (width, height)


def _frames_of_video(path: str, times: Sequence[Fraction]) -> Iterator[Image.Image]:
    with _opened(path) as (container, stream):
        begin = stream.start_time
        if times and times[0] > FAR and begin is not None:
            container.seek(int(begin + times[0] / stream.time_base), stream=stream)
        frames = _timed(container, stream, begin)
        first = next(frames, None)
        is_behind = first is not None and bool(times) and first[0] > max(times[0], 0)
        if first is not None and not is_behind:
            yield from _pictures(path, first, frames, stream, times)
            return
    with _opened(path) as (container, stream):  # its index leads elsewhere, or its first frame is later than it says
        frames = _timed(container, stream, None)
        if (first := next(frames, None)) is None:
            raise DataError(f"{path}: no frame can be decoded. Replace it, or remove its row")
        yield from _pictures(path, first, frames, stream, times)


def _timed(container: Any, stream: Any, begin: int | None) -> Iterator[tuple[Fraction, Any]]:
    """Frames with their seconds from ``begin``, in the stream's unit; None: from the first. Without times by number."""
    step = 1 / (stream.average_rate or Fraction(1))
    for k, frame in enumerate(container.decode(stream)):
        begin = frame.pts if begin is None else begin
        yield (k * step if frame.pts is None else (frame.pts - begin) * stream.time_base), frame


def _pictures(path: str, first: tuple[Fraction, Any], rest: Iterator[tuple[Fraction, Any]], stream: Any,
              times: Sequence[Fraction]) -> Iterator[Image.Image]:
    last = first[0]

    def all_frames() -> Iterator[tuple[Fraction, Any]]:
        nonlocal last
        yield first
        for time, frame in rest:
            last = time
            yield time, frame

    previous: tuple[Any, Image.Image] | None = None
    for frame in _nearest(all_frames(), times):
        if previous is None or previous[0] is not frame:
            previous = frame, _picture(frame, stream)
        yield previous[1]
    if times and times[-1] - last > QUARTER + 2 / (stream.average_rate or 1):  # more than a last frame that stays
        raise DataError(f"{path} ends after {float(last):.2f} s; expected a frame at {float(times[-1]):.2f} s. The "
                        "file is damaged: replace it, or remove its row")


def _picture(frame: Any, stream: Any) -> Image.Image:
    """One decoded frame in RGB, transparent parts over white, upright, with square pixels."""
    if any(component.is_alpha for component in frame.format.components):
        image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if (ratio := stream.sample_aspect_ratio or 1) != 1:
        image = image.resize((round(image.width * ratio), image.height), Image.Resampling.BILINEAR)
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


def seconds_text(seconds: float) -> str:
    """``1.06 s`` or ``2 min 5 s``."""
    return f"{seconds:.3g} s" if seconds < 100 else f"{math.floor(seconds / 60)} min {seconds % 60:.0f} s"
