"""SIGTERM and SIGINT: the running step is finished and saved before the process ends, but not for longer than allowed.

The system writes a signal's number into a pipe the moment it comes (``signal.set_wakeup_fd``), whatever the main
thread is doing; a thread reads it. A handler of Python would have to wait until the main thread runs Python again: in
a call that hangs, for ever.
"""
from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

from ms_diffsynth.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HUNG = 75  # exit code: try again
_ONE_SECONDS = 1.0  # what comes sooner is the same wish: Slurm and systemd send to a launcher and to its workers

_END = b"\0"  # no signal has this number
_active: StopRequest | None = None


class Stopped(SystemExit):
    """A signal was obeyed; uncaught it ends the process with 128 + the signal's number, as shells count."""


class StopRequest:
    """Whether a signal asked to stop: ``signal`` is None until then. A run asks between two steps."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._can_interrupt = False

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A signal inside the block raises `Interrupted`, once: for work that is of no use then."""
        self._can_interrupt = True
        try:
            yield
        except Interrupted:
            while self.signal is None:  # the thread is about to note it
                time.sleep(0.001)
            raise
        finally:
            self._can_interrupt = False

    def _handle(self, *_: object) -> None:
        if self._can_interrupt:
            self._can_interrupt = False  # whatever puts things right on the way out is left in peace
            raise Interrupted


@contextlib.contextmanager
def stopping_on_signals(grace_seconds: float) -> Iterator[StopRequest]:
    """Inside the block the first SIGTERM or SIGINT is only noted; at its end it raises `Stopped`.

    The second one, more than a second later, ends the process at once. So does the first when the block is not left
    within ``grace_seconds``: with exit code 75, and the stack of every thread on stderr. Handlers, and whatever was
    woken by signals before, are put back at the end.

    Outside the main thread, where Python cannot handle signals, nothing is done. A block inside another one shares its
    request. A signal that is ignored (``nohup``) stays ignored.
    """
    if _active is not None:
        yield (stop := _active)
    elif threading.current_thread() is threading.main_thread():
        with _watched(stop := StopRequest(), grace_seconds):
            yield stop
    else:
        yield (stop := StopRequest())
    if stop.signal is not None:
        raise Stopped(128 + stop.signal)


@contextlib.contextmanager
def _watched(stop: StopRequest, grace_seconds: float) -> Iterator[None]:
    """Note signals in ``stop`` for the time of the block."""
    global _active
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader, stop, grace_seconds), name="signals", daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # without a handler the system would not tell the pipe
    before = {number: signal.signal(number, stop._handle) for number in SIGNALS
              if signal.getsignal(number) != signal.SIG_IGN}
    _active = stop
    try:
        yield
    finally:
        _active = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(woken)
        os.write(writer, _END)
        thread.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, stop: StopRequest, grace_seconds: float) -> None:
    """Read the numbers of signals until the block ends, or end the process."""
    first, until = 0.0, None
    while True:
        left = None if until is None else max(until - time.monotonic(), 0.0)
        if not select.select([reader], [], [], left)[0]:
            _tell(f"{stop.signal.name} was {grace_seconds:g} s ago and the step is not finished and saved: ended as it "
                  "stands. What was saved before is whole; see --grace_seconds. Every thread was here:")
            faulthandler.dump_traceback(2)
            os._exit(HUNG)
        for number in os.read(reader, 64):
            if number == _END[0]:
                return
            if number not in SIGNALS or (until is not None and time.monotonic() - first < _ONE_SECONDS):
                continue
            if until is not None:
                _tell(f"{signal.Signals(number).name} again: ended at once")
                os._exit(128 + number)
            first = time.monotonic()
            stop.signal, until = signal.Signals(number), first + grace_seconds
            _tell(f"{stop.signal.name}: finishing this step and saving, for at most {grace_seconds:g} s; once more "
                  "ends at once")


def _tell(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # the main thread may hold the lock of sys.stderr
