"""What a worker tells its launcher: that it moves."""
from __future__ import annotations

import json
import os
import time
from functools import lru_cache

HEARTBEAT = "MS_DIFFSYNTH_HEARTBEAT"  # the variable that names the file; outside a launch there is none
STEP = "step"  # the one phase that is expected to be short
BEAT_BYTES = 128

_last: tuple[int, str] = (0, "start")
_steps = 0  # begun by this process


def beat(step: int, phase: str = STEP) -> None:
    """Say that ``phase`` of ``step`` begins now. Outside a launch this does nothing.

    Call it before every step, and before anything else that may take longer than a step: ``beat(7, "save")``. The
    launcher ends a job when every worker has been in one phase for too long: in a ``"step"`` for ``--hang_seconds`` and
    five times the longest step so far, in any other for ``--compile_seconds``. So a worker that saves excuses those
    that wait for it.

    Any thread may call it: it is one system call that writes 128 bytes over those of the last time.
    """
    global _last, _steps
    _steps += phase == STEP and (step, phase) != _last
    _last = step, phase
    if (file := _file()) is not None:
        text = json.dumps({"step": step, "phase": phase[:40], "time": round(time.time(), 3), "steps": _steps})
        os.pwrite(file, text.ljust(BEAT_BYTES).encode(), 0)


def still() -> None:
    """Say that the present phase continues: before each of many parts of a long one, such as images."""
    beat(*_last)


@lru_cache(maxsize=1)
def _file() -> int | None:
    """The file of the heartbeats, looked for once; None outside a launch.

    The launcher has made it in its full size, so that a full disk does not end a job at a heartbeat.
    """
    path = os.environ.get(HEARTBEAT)
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC) if path else None
