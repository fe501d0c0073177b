"""Rank 0 on the user's terminal, as if it had been started there: byte for byte, with colours and progress bars.

Only two lines that MindSpore writes whenever a worker leaves are in the log alone.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import select
import termios
import time
from pathlib import Path

_CHUNK = 4096  # bytes; a pipe that can be written to takes so many at once (PIPE_BUF)
# what MindSpore 2.10 says when a worker leaves, whatever the level of its log: a line that begins and ends so
_NOISE, _NOISE_END = b"[INFO] DISTRIBUTED(", b"Event base dispatch success!"


class Screen:
    """Passes what a process writes on to ``targets`` (stdout and stderr of ours), and line by line to a log.

    Where a target is a terminal the process gets a terminal too, of the same size. Nothing is read before what was read
    last could be shown: a terminal that is paused holds up the process, as it would without a launcher, but never the
    launcher.

    Attributes:
        outputs: what the process gets for stdout and stderr.
    """

    def __init__(self, log: Path, targets: tuple[int, int] = (1, 2)):
        out, err = targets
        self._log = open(log, "ab", buffering=0)
        self._channels = [_Channel(out)] if _is_same(out, err) else [_Channel(out), _Channel(err)]
        self.outputs = (self._channels[0].entry, self._channels[-1].entry)

    def started(self) -> None:
        """Give up our own ends of what the process has now."""
        for channel in self._channels:
            os.close(channel.entry)

    def wait(self, seconds: float, *others: int) -> None:
        """Pass on what there is, or return after so many seconds, or when one of the file descriptors has data."""
        for channel in self._channels:
            channel.fit()
        readable, writable, _ = select.select(
            [c.source for c in self._channels if c.is_open and not c.pending] + list(others),
            [c.target for c in self._channels if c.pending], [], seconds)
        for channel in self._channels:
            if channel.source in readable:
                self._keep(channel.read())
            if channel.target in writable and channel.pending:
                channel.write()

    def hide(self) -> None:
        """From now on only the log gets what is written: stacks, when a job is ended that hangs."""
        for channel in self._channels:
            channel.is_shown = False

    def finish(self, seconds: float) -> None:
        """Pass on what is left when the process has ended, for at most so long, and end the line it is in."""
        until = time.monotonic() + seconds
        while any(c.is_open or c.pending for c in self._channels) and time.monotonic() < until:
            self.wait(0.1)
        for channel in self._channels:
            self._keep(channel.rest())
            if channel.is_in_line and not channel.pending:
                show(channel.target, b"\n")
        self._log.close()

    def _keep(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: the run itself will say so, on the terminal
            self._log.write(text)


def show(target: int, text: bytes, seconds: float = 0.0) -> None:
    """Write a line of our own, unless the terminal is gone, or paused for longer than this."""
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        file = _unblocking(target) if os.isatty(target) else target
        while text and select.select([], [file], [], max(until - time.monotonic(), 0))[1]:
            text = text[os.write(file, text):]
        if file != target:
            os.close(file)


def _unblocking(terminal: int) -> int:
    """The same terminal, opened once more: one that can take a byte lets a write of two wait.

    The file descriptor that we were given is the shell's too, so it stays as it is.
    """
    try:
        return os.open(f"/proc/self/fd/{terminal}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # another user's, as after su
        return terminal


class _Channel:
    """One of the two ways out of the process, or both in one."""

    def __init__(self, target: int):
        self.is_shown = _is_valid(target)
        self.is_open = True
        self.is_in_line = False  # whether the last byte shown was no newline
        self.pending = b""  # read and not yet shown
        self._line = b""  # since the last newline: not yet in the log
        self._quiet = _Quiet()
        self._size = b""
        self.is_terminal = self.is_shown and os.isatty(target)
        self.target = _unblocking(target) if self.is_terminal else target
        self.source, self.entry = os.openpty() if self.is_terminal else os.pipe()
        if self.is_terminal:
            self.fit()
            attributes = termios.tcgetattr(self.entry)
            attributes[1] &= ~termios.OPOST  # newlines as they are; the real terminal does the rest
            termios.tcsetattr(self.entry, termios.TCSANOW, attributes)

    def fit(self) -> None:
        """Give the process's terminal the size of ours."""
        if self.is_terminal:
            with contextlib.suppress(OSError):  # ours is gone
                size = fcntl.ioctl(self.target, termios.TIOCGWINSZ, bytes(8))
                if size != self._size:
                    fcntl.ioctl(self.source, termios.TIOCSWINSZ, size)
                    self._size = size

    def read(self) -> bytes:
        """Take what the process wrote. Returns: the lines it ended, each as it last looked when it was overwritten."""
        try:
            data = os.read(self.source, _CHUNK)
        except OSError:  # EIO: the process's side of the terminal is closed
            data = b""
        self.pending = self._quiet(data) if self.is_shown else b""
        if not data:
            self.is_open = False
            os.close(self.source)
            return b""
        *lines, line = (self._line + data).split(b"\n")
        self._line = b"\r".join(line.rsplit(b"\r", 2)[-2:])  # a bar is overwritten for days
        return b"".join(_final(line) + b"\n" for line in lines)

    def write(self) -> None:
        """Show as much as can be shown now."""
        try:
            count = os.write(self.target, self.pending)
        except BlockingIOError:
            return
        except OSError:  # the terminal was closed, or nobody reads the pipe: the log goes on
            self.is_shown, self.pending = False, b""
            return
        self.is_in_line = self.pending[count - 1] != ord("\n") if count else self.is_in_line
        self.pending = self.pending[count:]

    def rest(self) -> bytes:
        """The line that was never ended."""
        return _final(self._line) + b"\n" if self._line else b""


class _Quiet:
    """Leaves out MindSpore's lines, in whatever pieces they come: called with each piece, at the end with ``b""``."""

    def __init__(self):
        self._held = b""  # the beginning of a line that may become one of them
        self._is_in_line = False  # whether the last byte let through was no newline

    def __call__(self, piece: bytes) -> bytes:
        *lines, rest = (self._held + piece).split(b"\n")
        kept = []
        for line in lines:
            if self._is_in_line or not (line.startswith(_NOISE) and line.rstrip(b"\r").endswith(_NOISE_END)):
                kept.append(line + b"\n")
            self._is_in_line = False
        may_be_noise = rest[:len(_NOISE)] == _NOISE[:len(rest)] and not self._is_in_line
        self._held = rest if piece and may_be_noise else b""
        if rest and not self._held:
            kept.append(rest)
            self._is_in_line = True
        return b"".join(kept)


def _final(line: bytes) -> bytes:
    """What is left of a line when its progress bar was drawn for the last time."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _is_valid(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


def _is_same(out: int, err: int) -> bool:
    return _is_valid(out) and _is_valid(err) and os.path.sameopenfile(out, err)
