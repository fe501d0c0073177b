"""Clips: which frames of a film are one row, at one rate and of one of a few lengths, and reading them.

No frame is left out, repeated or cut off without being told: `describe_clips` says what a data set loses.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DataError, listing
from .operators import DataProcessingOperator, crop_and_resize
from .paths import resolve
from .video import Film, frames_at, seconds_text

PLACES = ("start", "middle", "all")
ROUNDING = 0.01  # of a frame, by which times in files may be off


class Clip(NamedTuple):
    """Frames of one film: ``frames`` of them, ``rate`` a second, from ``start`` seconds on."""

    name: str
    start: float
    frames: int
    rate: float

    @property
    def times(self) -> list[Fraction]:
        """When its frames are, in seconds from the first of the film."""
        start, rate = (Fraction(number).limit_denominator(10**6) for number in (self.start, self.rate))
        return [start + k / rate for k in range(self.frames)]


@dataclass(frozen=True, kw_only=True)
class Clips:
    """How clips are taken from films.

    Attributes:
        lengths: in frames, each a multiple of ``factor`` and one more; a film gets the longest that it has.
        rate: frames a second at which films are trained.
        place: "start" takes one clip from the beginning of a film, "middle" one from its middle, "all" as many as there
            are behind each other.
        skip: seconds at the beginning of every film that are left out.
        factor: frames of the film for each frame of latents behind the first.
    """

    lengths: tuple[int, ...]
    rate: float
    place: str = "start"
    skip: float = 0.0
    factor: int = 4

    def __post_init__(self):
        for length in self.lengths or (0,):
            if length < 1 or (length - 1) % self.factor:
                below = max(1, (length - 1) // self.factor * self.factor + 1)
                raise ConfigError(f"num_frames={length}: expected a multiple of {self.factor} and one more, such as "
                                  f"{below} or {below + self.factor}.")
        if self.place not in PLACES:
            raise ConfigError(f"clips={self.place}: expected one of {', '.join(PLACES)}.")

    def frames_in(self, film: Film, start: float) -> int:
        """How many frames there are from ``start`` seconds on, at the rate that is trained."""
        if film.frames == 1:
            return 1
        seconds = film.frames / self.rate if film.seconds is None else film.seconds
        return max(0, math.ceil((seconds - start) * self.rate - ROUNDING))

    def of(self, name: str, film: Film, start: float | None = None) -> list[Clip]:
        """The clips of a film; ``start``, in seconds, is that of one clip alone, whatever ``place`` says.

        Raises: DataError for a film that is shorter than the shortest clip.
        """
        if film.frames == 1:
            return [Clip(name, 0.0, 1, self.rate)]
        begin = self.skip if start is None else start
        there = self.frames_in(film, begin)
        if not (fitting := [length for length in self.lengths if length <= there]):
            raise DataError(self._too_short(film, begin, there))
        length = max(fitting)
        if start is not None or self.place == "start":
            return [Clip(name, begin, length, self.rate)]
        if self.place == "middle":
            return [Clip(name, begin + (there - length) // 2 / self.rate, length, self.rate)]
        found, taken = [], 0
        while fitting := [n for n in self.lengths if n <= there - taken and (n > 1 or max(self.lengths) == 1)]:
            found.append(Clip(name, begin + taken / self.rate, max(fitting), self.rate))
            taken += max(fitting)
        return found or [Clip(name, begin, length, self.rate)]

    def _too_short(self, film: Film, begin: float, there: int) -> str:
        behind = f" behind second {begin:g}" if begin else ""
        had = f"{film.frames} frames" if film.seconds is None else seconds_text(film.seconds)
        fits = (there - 1) // self.factor * self.factor + 1
        remedy = (f"Add a length that it has, num_frames={','.join(map(str, sorted({fits, *self.lengths})))}, or"
                  if fits > 1 else "Raise fps, or")
        return (f"{had} long, which is {there} frame{'' if there == 1 else 's'} at {self.rate:g} a second{behind}; "
                f"expected {min(self.lengths)} or more. {remedy} remove it")


class LoadClip(DataProcessingOperator):
    """A `Clip` as an array: uint8 [F, H, W, 3], RGB, every frame brought to its size alike.

    Args:
        resize: has ``target_size(width, height)``, as `ImageCropAndResize` and `BucketCropAndResize`; None: as it is.
        clips: how the clips were chosen, which describes them.
    """

    not_described = ("base_path", "allow_outside_base")

    def __init__(self, base_path: str, resize: Any, clips: Clips, allow_outside_base: bool = False):
        self.base_path, self.resize, self.allow_outside_base = base_path, resize, allow_outside_base
        self.clips = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(clips).items()}

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels of the frames of a film of width x height."""
        return (height, width) if self.resize is None else self.resize.target_size(width, height)

    def __call__(self, data: Clip) -> np.ndarray:
        path = resolve(self.base_path, data.name, self.allow_outside_base)
        rate = Fraction(data.rate).limit_denominator(10**6)
        found = None
        for k, frame in enumerate(frames_at(path, data.times, rate)):
            size = self.target_size(*frame.size)
            image = frame if frame.size == size[::-1] else crop_and_resize(frame, *size)
            found = np.empty((data.frames, *size, 3), np.uint8) if found is None else found
            found[k] = np.asarray(image)
        return found


def describe_clips(clips: Clips, films: Mapping[str, Film],
                   chosen: Sequence[Clip]) -> tuple[list[tuple[str, str]], list[str]]:
    """What a data set of films is, as labels and texts, and what to warn of.

    Args: ``films`` by name; ``chosen`` the clip of every row.
    """
    moving = {clip.name: films[clip.name] for clip in chosen if films[clip.name].frames > 1}
    told = {name: film for name, film in moving.items() if film.seconds is not None}
    lines: list[tuple[str, str]] = []
    seconds = {name: clips.frames_in(film, 0) / clips.rate for name, film in moving.items()}
    if moving:
        least, most = min(seconds, key=seconds.get), max(seconds, key=seconds.get)
        lines.append(("lengths", f"{seconds_text(sum(seconds.values()))} in all, " + (
            f"each {seconds_text(seconds[least])}" if seconds[least] == seconds[most] else
            f"from {seconds_text(seconds[least])} ({least}) to {seconds_text(seconds[most])} ({most})")))
        rates = Counter(f"{film.rate:.3g}" if film.is_even else f"about {film.rate:.3g}, variable"
                        for film in told.values())
        rates["not known: taken as they are"] = len(moving) - len(told)
        lines.append(("frame rates", listing((f"{rate} ({n})" for rate, n in rates.most_common() if n), 6)
                      + f"; trained at {clips.rate:g} a second"))
    by_length = Counter(clip.frames for clip in chosen)
    lines.append(("clips", listing((f"{length} frame{'s' if length > 1 else ''} ({n})"
                                    for length, n in sorted(by_length.items())), 8) + _where(clips, bool(moving))))
    return lines, list(_warnings(clips, moving, told, seconds, chosen))


def _where(clips: Clips, has_films: bool) -> str:
    where = {"start": "from the beginning of each film", "middle": "from the middle of each film",
             "all": "all there are, behind each other"}[clips.place]
    return f", {where}{f', without its first {clips.skip:g} s' if clips.skip else ''}" if has_films else ""


def _warnings(clips: Clips, moving: Mapping[str, Film], told: Mapping[str, Film], seconds: Mapping[str, float],
              chosen: Sequence[Clip]) -> Iterator[str]:
    used = Counter()
    for clip in chosen:
        used[clip.name] += clip.frames / clips.rate if clip.name in moving else 0
    lost = {name: seconds[name] - used[name] for name in moving if seconds[name] - used[name] > 0.5 / clips.rate}
    if lost:
        share = sum(lost.values()) / sum(seconds.values())
        remedy = "" if clips.place == "all" else ". clips=all trains on them, a row for each clip"
        yield (f"{seconds_text(sum(lost.values()))} of {seconds_text(sum(seconds.values()))} of film ({share:.0%}) are "
               f"in no clip, most of {max(lost, key=lost.get)}{remedy}")
    slow = {name: film.rate for name, film in told.items() if film.is_even and film.rate < clips.rate * (1 - ROUNDING)}
    if slow:
        yield (f"{len(slow)} of {len(moving)} films have fewer than {clips.rate:g} frames a second, so that frames "
               f"come twice: {listing((f'{name} {rate:.3g}' for name, rate in slow.items()), 5)}. Set "
               f"fps={min(slow.values()):.3g}, or leave them out")
