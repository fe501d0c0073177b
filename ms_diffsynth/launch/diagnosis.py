"""What is wrong with a job, if anything, and how that is told in one line: from exit codes, heartbeats and logs."""
from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ms_diffsynth.errors import INTERNAL
from ms_diffsynth.launch.job import Job
from ms_diffsynth.launch.process import Process
from ms_diffsynth.launch.worker import BEAT_BYTES, STEP

TRY_AGAIN = 75  # exit code when a worker was killed, stopped or hung: 137 or 143 would be the launcher's own end

STOPPED_SECONDS = 5.0  # a worker may be stopped for this long
SLACK = 5.0  # a step may last this many times the longest one before

_TAIL = 256 * 1024  # bytes; MindSpore writes long stacks of its own after a Python exception
_WIDTH = 400
_TRACEBACK = "Traceback (most recent call last):"
_KINDS = "Error|Exception|Interrupt|Exit|Timeout"
_NAMED = re.compile(rf"(?:[A-Za-z_][\w.]*(?:{_KINDS})|Fatal Python error)(?::\s.*)?")
_WHERE = re.compile(r'\s+File "(.+)", line (\d+) in (\S+)')


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the launcher's exit code, and its last line, which is asked for when all logs are written."""

    code: int
    line: Callable[[], str] = str  # none


class Diagnosis:
    """Looks at the processes of a job. Times are those of the supervisor's clock.

    Args:
        pulses: one a worker, in the same order.
    """

    def __init__(self, job: Job, workers: list[Process], pulses: list[Pulse], scheduler: Process | None):
        self.job, self.workers, self.pulses, self.scheduler = job, workers, pulses, scheduler
        self._stopped: dict[Process, float] = {}  # since when

    def look(self, now: float) -> None:
        """Read the heartbeats."""
        for pulse in self.pulses:
            pulse.look(now)

    def find_failed(self, now: float) -> Outcome | None:
        """The first process that ended badly, or that is stopped for too long."""
        self.look(now)
        processes = self.workers + [self.scheduler] if self.scheduler else self.workers
        dead = [p for p in processes if p.code not in (None, 0)]
        if dead:  # of several since the last look: an exception may come from a death, a death from no exception
            first = min(dead, key=lambda p: p.code > 0)
            return Outcome(code_of(first), partial(self.tell_dead, first))
        self._stopped = {p: self._stopped.get(p, now) for p in processes if p.code is None and p.is_stopped}
        stopped = next((p for p, since in self._stopped.items() if now - since >= STOPPED_SECONDS), None)
        if stopped is None:
            return None
        return Outcome(TRY_AGAIN, lambda: f"{stopped.name} was stopped by a signal for {STOPPED_SECONDS:g} s"
                                          f"{self._at(stopped)} (log: {stopped.log})")

    def find_hung(self, now: float) -> Outcome | None:
        """When no worker has begun anything for longer than it may: the one that is furthest behind.

        A worker that is allowed more time (it saves, it compiles) excuses the others: they wait for it. Call it after
        `find_failed`, which reads the heartbeats.
        """
        beating = [(p, w) for p, w in zip(self.pulses, self.workers) if w.code is None and p.step is not None]
        late = [(p, w) for p, w in beating if p.is_late(now, self.job.hang_seconds, self.job.compile_seconds)]
        if not late or len(late) < len(beating):
            return None
        step = min(pulse.step for pulse, _ in late)
        behind = [(p, w) for p, w in late if p.step == step]
        seconds = now - min(p.since for p, _ in behind)
        gone = next((w for w in self.workers if w.code == 0), None)
        if gone is not None:  # without it the others wait for ever
            return Outcome(INTERNAL, lambda: f"{gone.name} ended too early, with exit code 0{self._at(gone)}; the "
                                             f"others waited {seconds:.0f} s for it (log: {gone.log})")
        return Outcome(TRY_AGAIN, partial(self._tell_hung, [w for _, w in behind], seconds))

    def tell_dead(self, process: Process) -> str:
        """One line about a process that ended badly: its exit code or signal, and its last exception."""
        words = last_exception(process.log, process.log_begin)
        how = f"failed with exit code {process.code}" if process.code > 0 else f"was killed by {_name(-process.code)}"
        how += self._at(process)
        if process.code == -signal.SIGKILL:  # which leaves no words; those in the log are of another matter
            how, words = f"{how} (by a user, or by the system because memory ran out)", ""
        if self.job.nodes > 1 and self.scheduler not in (None, process) and (self.scheduler.code or 0) > 0:
            words += f"; the scheduler: {last_exception(self.scheduler.log, self.scheduler.log_begin)}"
        return f"{process.name} {how}{f': {words}' if words else ''} (log: {process.log})"

    def _tell_hung(self, behind: list[Process], seconds: float) -> str:
        """One line about the worker that the others wait for: who waits in a collective is inside MindSpore."""
        places = {w: last_place(w.log, w.log_begin) for w in self.workers}
        first = min(behind, key=lambda w: places[w] is not None and "/mindspore/" in places[w].file)
        told = {w: f"{self._at(w)}, {places[w] or 'at an unknown place'}" for w in self.workers}
        others = "".join(f"; {w.name}{told[w]}" for w in self.workers if w is not first)
        return (f"{first.name} hung: nothing begun for {seconds:.0f} s{told[first]}{others}; every thread's stack is "
                f"in the logs (log: {first.log})")

    def _at(self, process: Process) -> str:
        return str(self.pulses[self.workers.index(process)]) if process in self.workers else ""


def code_of(process: Process) -> int:
    """The launcher's exit code for a process that ended badly: its own, or 75 when a signal ended it."""
    return process.code if process.code > 0 else TRY_AGAIN


def _name(number: int) -> str:
    return {s.value: s.name for s in signal.Signals}.get(number, f"signal {number}")


# -- heartbeats, read --------------------------------------------------------------------------------------------------


class Pulse:
    """The heartbeat of one rank. A worker that never calls `beat` has none, and cannot be found to hang.

    Times are those at which the launcher saw a change, on its own clock: clocks of two processes are never compared.
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
        elif found["steps"] > 1 and self._longest is None:  # the first steps were over between two looks
            self._longest = 0.0
        self._text, self.step, self.phase, self.since = text, found["step"], found["phase"], now

    def is_late(self, now: float, hang_seconds: float, compile_seconds: float) -> bool:
        """Whether it has been in this phase for longer than that phase may last."""
        if self.phase != STEP or self._longest is None:
            return now - self.since > compile_seconds
        return now - self.since > max(hang_seconds, SLACK * self._longest)

    def __str__(self) -> str:
        return "" if self.step is None else f" in phase '{self.phase}' of step {self.step}"


# -- the last lines of a log -------------------------------------------------------------------------------------------


def last_exception(log: Path, begin: int = 0) -> str:
    """The last exception written after ``begin`` bytes, without its traceback; empty when there is none.

    It is the line that ends a traceback, whatever its class is called, or a line that begins like ``DataError: ...``.
    """
    found, is_inside = "", False
    for line in _lines(log, begin):
        if line.endswith(_TRACEBACK):
            is_inside = True
        elif is_inside and line and not line.startswith((" ", "|", "+")):
            found, is_inside = line, False
        elif _NAMED.fullmatch(line):
            found = line
    return found if len(found) <= _WIDTH else found[:_WIDTH] + " ..."


class Place(NamedTuple):
    """A line of source."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} in {self.function}"


def last_place(log: Path, begin: int = 0) -> Place | None:
    """Where the main thread, which comes last, was when SIGABRT ended a process; None when it did not say."""
    found, is_next = None, False
    for line in _lines(log, begin):
        if is_next and (match := _WHERE.fullmatch(line)):
            found = Place(*match.groups())
        is_next = line.endswith(" (most recent call first):")
    return found


def _lines(log: Path, begin: int) -> list[str]:
    with open(log, "rb") as file:
        file.seek(max(begin, file.seek(0, 2) - _TAIL))
        return file.read().decode(errors="replace").splitlines()
