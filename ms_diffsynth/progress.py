"""One progress bar: loss, learning rate, speed, time left; and the compile phase with a timer."""
from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from ms_diffsynth.redact import redact

# What may be cut off on a narrow terminal is last. With 80 columns a run of 20,000 steps shows all of it.
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


def is_terminal() -> bool:
    """Whether stderr is a terminal with room for a bar: those of some containers have 0 columns."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # what only says that it is one
        return False


class Progress:
    """The terminal of a training run. Lines go above the bar; without a terminal a line now and then stands for it.

    Args:
        enabled: False on every rank but the first.

    Attributes:
        shown: what is shown beside the bar besides the values of a step, such as the validation loss.
    """

    every_seconds = 10.0  # between two lines without a terminal
    timer_seconds = 0.5  # between two updates of the timer of a compilation

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.is_terminal = is_terminal()
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}
        self._said = 0.0
        self._text = ""
        self._stop = threading.Event()  # of the timer of the compilation that runs

    def say(self, text: str) -> None:
        """One line above the bar, without secrets."""
        if self.enabled:
            tqdm.write(redact(text), file=sys.stderr)

    def begin(self, total: int, text: str, unit: str, done: int = 0) -> None:
        """Start the bar of a phase, of which this many are ``done`` already."""
        self.end()
        self.bar = tqdm(total=total, initial=done, desc=text, unit=unit, dynamic_ncols=True, mininterval=0.2,
                        bar_format=BAR if self.is_terminal else None, file=sys.stderr,
                        disable=not (self.enabled and self.is_terminal))
        self._text, self._total, self._count, self._said = text, total, done, time.monotonic()

    def advance(self, **shown: str) -> None:
        """One more, with values to show beside the bar."""
        if self.bar is None:
            return
        shown |= self.shown
        self.bar.set_postfix_str("  ".join(_shown(key, value) for key, value in shown.items()), refresh=False)
        self.bar.update(1)
        self._count += 1
        is_due = time.monotonic() - self._said >= self.every_seconds or self._count == self._total
        if not self.is_terminal and is_due:
            self._said = time.monotonic()
            values = "".join(f"  {_shown(key, value)}" for key, value in shown.items())
            self.say(f"{self._text} {self._count}/{self._total}{values}")

    def end(self) -> None:
        """Close the bar of the phase, and stop the timer of a compilation that failed."""
        self._stop.set()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def announce(self, name: str, shapes: str) -> Callable[[float], None]:
        """Show that ``name`` is being compiled, with a running timer; returns what to call when it is done."""
        began, stop = time.perf_counter(), threading.Event()
        self._stop = stop
        has_timer = self.enabled and self.is_terminal
        bar, text = self.bar, self._text
        if bar is None:  # between two phases: a line of its own, gone when it is done
            bar = tqdm(bar_format="{desc}", leave=False, disable=not has_timer, file=sys.stderr)

        def tick() -> None:
            while not stop.wait(self.timer_seconds):
                bar.set_description_str(f"compiling {name} {time.perf_counter() - began:.0f} s")

        thread = threading.Thread(target=tick, daemon=True)
        if has_timer:
            bar.set_description_str(f"compiling {name}")
            thread.start()
        else:
            self.say(f"compiling {name} ...")

        def done(seconds: float) -> None:
            stop.set()
            if has_timer:
                thread.join()
                bar.set_description_str(text, refresh=False)
                bar.start_t += seconds  # the speed and the time left do not count the compilation
                bar.last_print_t = bar._time()
                if bar is not self.bar:
                    bar.close()
            self.say(f"compiled {name} in {seconds:.1f} s")

        return done


def _shown(name: str, value: str) -> str:
    """``loss 0.12``; of a speed ``3.1 images/s``."""
    return f"{value} {name}" if name.endswith("/s") else f"{name} {value}"
