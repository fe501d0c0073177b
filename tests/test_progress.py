"""Progress: the bar, lines without a terminal, the timer of a compilation."""
from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import threading
import time

import pytest

from ms_diffsynth.progress import Progress


@pytest.fixture
def on_terminal(monkeypatch):
    monkeypatch.setattr("ms_diffsynth.progress.is_terminal", lambda: True)
    monkeypatch.setattr(Progress, "timer_seconds", 0.01)
    return Progress()


def test_without_a_terminal_lines_stand_for_the_bar(capfd, monkeypatch):
    progress = Progress()
    assert not progress.is_terminal
    progress.begin(3, "training", "step")
    for k in range(3):
        progress.advance(loss=f"{k}")
    progress.announce("the step", "2x3")(1.25)
    progress.end()
    assert capfd.readouterr().err.splitlines() == [
        "training 3/3  loss 2", "compiling the step ...", "compiled the step in 1.2 s"]
    monkeypatch.setattr(Progress, "every_seconds", 0.0)
    progress.begin(2, "training", "step")
    progress.advance(loss="1")
    assert capfd.readouterr().err.splitlines() == ["training 1/2  loss 1"]


def test_a_phase_that_goes_on_counts_from_where_it_was(capfd, monkeypatch):
    monkeypatch.setattr(Progress, "every_seconds", 0.0)
    progress = Progress()
    progress.begin(5, "training", "step", done=3)
    assert progress.bar.n == 3
    progress.advance(loss="1")
    assert capfd.readouterr().err.splitlines() == ["training 4/5  loss 1"]


def test_other_ranks_are_silent(capfd):
    progress = Progress(enabled=False)
    progress.begin(1, "training", "step")
    progress.say("hello")
    progress.announce("the step", "")(1.0)
    progress.advance(loss="1")
    progress.end()
    assert capfd.readouterr().err == ""


def test_the_bar_shows_the_compilation_and_does_not_count_it(on_terminal, capfd):
    on_terminal.begin(5, "training", "step")
    start = on_terminal.bar.start_t
    done = on_terminal.announce("the step", "2x3")
    assert on_terminal.bar.desc == "compiling the step"
    time.sleep(0.3)
    assert on_terminal.bar.desc == "compiling the step 0 s"
    done(0.25)
    assert on_terminal.bar.desc == "training" and on_terminal.bar.start_t == start + 0.25
    on_terminal.advance(loss="0.5", lr="1e-4")
    on_terminal.end()
    shown = capfd.readouterr().err
    assert "compiled the step in 0.2 s" in shown and "loss 0.5  lr 1e-4" in shown


def test_a_compilation_that_failed_leaves_no_timer_behind(on_terminal):
    on_terminal.begin(5, "training", "step")
    before = threading.active_count()
    on_terminal.announce("the step", "")
    assert threading.active_count() == before + 1
    on_terminal.end()  # nobody calls done: the step raised
    for _ in range(1000):
        if threading.active_count() > before:
            time.sleep(0.01)
    assert threading.active_count() == before


@pytest.fixture
def terminal(monkeypatch):
    """``terminal(columns)`` makes stderr one; it returns what reads what is shown."""
    opened = []

    def call(columns):
        reader, writer = os.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        opened.extend((reader, stream := os.fdopen(writer, "w")))
        monkeypatch.setattr(sys, "stderr", stream)

        def shown():
            stream.flush()
            return os.read(reader, 100_000).decode()

        return shown

    yield call
    for reader, stream in zip(opened[::2], opened[1::2]):
        stream.close()
        os.close(reader)


def test_80_columns_show_the_speed(terminal):
    shown = terminal(80)
    progress = Progress()
    assert progress.is_terminal
    progress.begin(20000, "training", "step", done=12344)
    progress.bar.mininterval = 0
    progress.advance(**{"images/s": "0.52", "loss": "0.1234", "lr": "1.0e-04", "skipped": "3"})
    progress.bar.refresh()
    last = shown().split("\r")[-1]
    assert "12345/20000" in last and "0.52 images/s  loss 0.1234  lr 1.0e-04" in last and len(last) <= 80
    progress.end()


def test_a_terminal_without_columns_gets_lines(terminal):
    shown = terminal(0)
    progress = Progress()
    progress.begin(1, "training", "step")
    progress.advance(**{"images/s": "3.10", "loss": "0.5"})
    progress.end()
    assert not progress.is_terminal and shown() == "training 1/1  3.10 images/s  loss 0.5\r\n"
