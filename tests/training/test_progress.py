"""Progress: the bar, lines without a terminal, the timer of a compilation."""
from __future__ import annotations

import threading
import time

import pytest

from ms_diffsynth.training.progress import Progress


@pytest.fixture
def on_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
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
    assert "compiled the step in 0.2 s" in shown and "loss=0.5, lr=1e-4" in shown


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
