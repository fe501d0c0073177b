"""A stand-in for CANN: MindSpore's Ascend backend, on a machine without an Ascend.

MindSpore's wheel holds its whole Ascend plugin; what it lacks is CANN, the libraries of the device. This folder builds
libraries of the same names from sources of its own (``native/``), on host memory. With them MindSpore compiles for an
Ascend and launches the operators that an Ascend would run; each is recorded with dtypes and shapes, and computed by
NumPy (``compute/``) or, where only counts and memory are wanted, not computed at all.

It is a device for tests and an engine for planning, never a way to train. What it cannot tell: time, whether a real
kernel accepts a shape or layout, and how a real kernel rounds. See docs/explanation/ascend.md.

    python -m ms_diffsynth.standin --log run.jsonl -- ms-diffsynth train CONFIG --device Ascend
"""
from __future__ import annotations

import ctypes
import os
from pathlib import Path

from ms_diffsynth.standin.log import Kernel, Log

__all__ = ["Kernel", "Log", "active", "environment", "mark"]

FOLDER = "MS_DIFFSYNTH_STANDIN"  # set where the stand-in is active: the folder of its libraries


def environment(log: str | Path | None = None, *, memory: float = 64.0, shapes_only: bool = False) -> dict[str, str]:
    """The environment of a process whose device Ascend is the stand-in; builds it where that has not been done.

    Args:
        log: file to append the log to, as JSON lines; None records nothing.
        memory: of the device, in GiB.
        shapes_only: record kernels without computing them; what they would have written stays as it was, mostly zero.

    Raises: DeviceError without a compiler, or where MindSpore has no Ascend plugin.
    """
    from ms_diffsynth.standin.build import build

    folder = build()
    package = str(Path(__file__).resolve().parents[2])
    result = dict(os.environ)
    result[FOLDER] = str(folder)
    result["LD_LIBRARY_PATH"] = _first(str(folder), result.get("LD_LIBRARY_PATH"))
    result["PYTHONPATH"] = _first(str(folder.parents[1] / "python"), result.get("PYTHONPATH"))
    if Path(package).name not in ("site-packages", "dist-packages"):
        result["PYTHONPATH"] = _first(package, result.get("PYTHONPATH"))
    result["MS_DIFFSYNTH_STANDIN_LOG"] = str(Path(log).resolve()) if log is not None else ""
    result["MS_DIFFSYNTH_STANDIN_MEMORY"] = str(memory)
    result["MS_DIFFSYNTH_STANDIN_SHAPES_ONLY"] = "1" if shapes_only else "0"
    return result


def _first(entry: str, rest: str | None) -> str:
    return os.pathsep.join([entry, *(e for e in (rest or "").split(os.pathsep) if e and e != entry)])


def active() -> bool:
    """Whether the device Ascend of this process is the stand-in."""
    return bool(os.environ.get(FOLDER))


def library() -> ctypes.CDLL:
    """The loaded stand-in, the one that MindSpore calls."""
    return ctypes.CDLL(str(Path(os.environ[FOLDER]) / "libascendcl.so"))


def mark(text: str) -> None:
    """Write a mark into the log; does nothing where the stand-in is not active.

    What runs asynchronously is recorded when it runs: call ``mindspore.runtime.synchronize()`` before a mark that
    divides one step from the next.
    """
    if active():
        library().standin_mark(text.encode())
