"""One process of a job, and whatever it starts: watched, asked to end, killed."""
from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """From now on the system sends ``number`` to this process when ``parent`` ends, however that ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number))
    if os.getppid() != parent:  # it had ended before the line above
        os.kill(os.getpid(), number)


class Process:
    """A process in a session of its own. Output is appended to ``log``, unless ``outputs`` says otherwise.

    A process that has ended is kept as a zombie until `reap`: until then no other process can have its number, nor
    its group's, and what is sent to them late cannot reach another one.

    Args:
        name: how messages call it.
        outputs: file descriptors for stdout and stderr.
    """

    def __init__(self, name: str, command: tuple[str, ...], environment: dict[str, str], log: Path,
                 outputs: tuple[int, int] | None = None):
        self.name, self.log, self.command = name, log, command
        with open(log, "ab") as file:
            file.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n".encode())
            file.flush()
            self.log_begin = file.tell()
            out, err = outputs or (file.fileno(), file.fileno())
            parent = os.getpid()
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                preexec_fn=lambda: end_with_parent(parent, signal.SIGKILL))
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        """None while it runs; then its exit code, or minus the number of the signal that ended it."""
        if self._process.returncode is not None:
            return self._process.returncode
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    @property
    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP, SIGTSTP) has stopped it."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def ask_to_end(self) -> None:
        """SIGTERM, also when it is stopped. What it has started itself is its own to end."""
        os.kill(self.pid, signal.SIGTERM)
        os.kill(self.pid, signal.SIGCONT)

    def abort(self) -> None:
        """SIGABRT: it prints where every thread is, and ends. No core is written, however large it would be."""
        limits = resource.prlimit(self.pid, resource.RLIMIT_CORE)
        resource.prlimit(self.pid, resource.RLIMIT_CORE, (0, limits[1]))
        os.kill(self.pid, signal.SIGABRT)
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL for it and for all that it has started in its group, even when it has ended itself."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self, seconds: float) -> bool:
        """Wait until it has ended, for at most this long. Returns: whether it has."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


class Tee:
    """Copies what a process writes to its stdout and stderr to ours, and both to its log. One thread for each.

    A terminal that is paused holds up the process, as it would without a launcher, but never the launcher.

    Attributes:
        outputs: what the process gets for stdout and stderr.
        is_shown: set it to False, and only the log gets what is written from now on.
    """

    def __init__(self, log: Path):
        self._log = open(log, "ab", buffering=0)
        pipes = [os.pipe(), os.pipe()]
        self.outputs = tuple(writer for _, writer in pipes)
        self.is_shown = True
        self._threads = [threading.Thread(target=self._copy, args=(reader, target), daemon=True)
                         for target, (reader, _) in enumerate(pipes, 1)]

    def start(self) -> None:
        """Begin, when the process has its ends: ours are closed, so that its end is seen."""
        for writer in self.outputs:
            os.close(writer)
        for thread in self._threads:
            thread.start()

    def finish(self, seconds: float) -> None:
        """Wait for what is left when the process has ended, for at most this long."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))

    def _copy(self, source: int, target: int) -> None:
        is_in_line = False
        while data := os.read(source, 1 << 16):
            with contextlib.suppress(OSError):  # a full disk: the run itself will say so, on the terminal
                self._log.write(data)
            if self.is_shown:
                is_in_line = not data.endswith(b"\n")
                self._show(target, data)
        if is_in_line:
            self._show(target, b"\n")

    def _show(self, target: int, data: bytes) -> None:
        try:
            write_all(target, data)
        except OSError:  # the terminal was closed, or the reader of the pipe has ended: the log continues
            self.is_shown = False


def write_all(target: int, data: bytes) -> None:
    """Write to a file, pipe or terminal, also to one that does not block. Raises: OSError."""
    while data:
        select.select([], [target], [])
        data = data[os.write(target, data):]
