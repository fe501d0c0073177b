"""The films of tests/data/videos, and whether they can be read here."""
from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

VIDEOS = Path(__file__).parents[1] / "data/videos"
HAS_AV = importlib.util.find_spec("av") is not None
needs_av = pytest.mark.skipif(not HAS_AV and not os.environ.get("CI"), reason="PyAV, extra [video], is not here")


def film(name):
    return str(VIDEOS / name)


def copy_films(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(VIDEOS / name, folder)


def animation(path, values, delays=50, size=(64, 48)):
    """A GIF or WebP whose frame k is gray of this value; ``delays`` in milliseconds."""
    frames = [Image.new("RGB", size, (value, value, value)) for value in values]
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delays, loop=0, **how)
    return str(path)


def folder_of_frames(path, values, size=(64, 48)):
    path.mkdir(parents=True)
    for k, value in enumerate(values):
        Image.new("RGB", size, (value, value, value)).save(path / f"{k}.png")
    return str(path)


def brightness(frames):
    """Of each frame, as a list of numbers."""
    return [float(np.asarray(frame).mean()) for frame in frames]
