"""Heartbeats, read: when a worker last began something, and whether it should have begun something else since."""
from __future__ import annotations

import json
from pathlib import Path

from ms_diffsynth.launch.worker import BEAT_BYTES, STEP

SLACK = 5.0  # a step may last so many times the longest so far


class Pulse:
    """The heartbeat of one rank. A worker that never calls `beat` has none, and cannot be found to hang.

    Times are those at which the launcher saw a change, on its own clock: nobody's clock is compared with another's.
    """

    def __init__(self, path: Path):
        self.path = path
        self.step: int | None = None
        self.phase = ""
        self.since = 0.0  # when it was first seen in this phase
        self._text = b" " * BEAT_BYTES
        self._longest: float | None = None  # seconds of a step; None before the first, which does not count, is done
        path.write_bytes(self._text)

    def look(self, now: float) -> None:
        """Read the file."""
        text = self.path.read_bytes()
        if text == self._text:
            return
        try:
            found = json.loads(text)
        except ValueError:  # half of it was written this moment
            return
        if self.phase == STEP:
            self._longest = 0.0 if self._longest is None else max(self._longest, now - self.since)
        self._text, self.step, self.phase, self.since = text, found["step"], found["phase"], now

    def is_late(self, now: float, hang_seconds: float, compile_seconds: float) -> bool:
        """Whether it has been in this phase for longer than that phase may last."""
        if self.phase != STEP or self._longest is None:
            return now - self.since > compile_seconds
        return now - self.since > max(hang_seconds, SLACK * self._longest)

    def __str__(self) -> str:
        return "" if self.step is None else f" in phase '{self.phase}' of step {self.step}"
