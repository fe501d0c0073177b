"""Signals: noted at once, obeyed at the end of the block; a process that hangs is ended; handlers are put back."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import environment

from ms_diffsynth.training.signals import HUNG, Interrupted, Stopped, stopping_on_signals

pytestmark = pytest.mark.fault

START = """
import ctypes, signal, sys, time
from ms_diffsynth.training.signals import stopping_on_signals
def wait(): time.sleep(60)
def hang_in_the_main_thread():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as in a call that is never interrupted
    ctypes.CDLL(None).sleep(60)
with stopping_on_signals({grace}):
    print("begun", flush=True)
    {what}()
"""


def child(what, grace):
    """A process inside a block that it would leave after a minute."""
    process = subprocess.Popen([sys.executable, "-c", START.format(what=what, grace=grace)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment())
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    return process


def raised(number, stop):
    """Send a signal to this process and wait until it is noted."""
    os.kill(os.getpid(), number)
    for _ in range(200):
        if stop.signal is not None:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_obeyed_at_the_end_of_the_block(number, code, capfd):
    done = []
    with pytest.raises(Stopped) as error:
        with stopping_on_signals(60) as stop:
            raised(number, stop)
            done.append(stop.signal)
    assert done == [number] and error.value.code == code
    assert f"{number.name}: finishing this step and saving, for at most 60 s; once more" in capfd.readouterr().err
    assert not issubclass(Stopped, Exception), "no script's own `except Exception` takes it for a failure"


def test_everything_is_put_back():
    def own(*_):
        return None

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.signal(signal.SIGTERM, own)
    woken = signal.set_wakeup_fd(writer)
    threads = threading.active_count()
    try:
        with stopping_on_signals(60) as stop:
            assert signal.getsignal(signal.SIGTERM) is not own and threading.active_count() == threads + 1
        assert stop.signal is None and signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert threading.active_count() == threads and signal.set_wakeup_fd(writer) == writer
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)
        os.close(reader)
        os.close(writer)


def test_an_error_is_not_hidden_by_a_signal():
    with pytest.raises(OSError, match="disk"):
        with stopping_on_signals(60) as stop:
            raised(signal.SIGTERM, stop)
            raise OSError("disk")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_inner_block_shares_the_request_and_both_end():
    reached = []
    with pytest.raises(Stopped):
        with stopping_on_signals(60) as outer:
            with stopping_on_signals(0.001) as inner:
                assert inner is outer
                raised(signal.SIGTERM, inner)
            reached.append("outer")
    assert not reached


def test_another_thread_is_left_alone():
    found = []

    def work():
        with stopping_on_signals(60) as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, signal.SIG_DFL)]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping_on_signals(60) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("what", ["wait", "hang_in_the_main_thread"])
def test_a_process_that_hangs_is_ended_after_the_grace_period_with_its_stacks(what):
    process = child(what, 0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == HUNG == 75 and time.monotonic() - began > 0.4
    assert "SIGTERM was 0.5 s ago and the step is not finished and saved" in err and f"in {what}" in err


@pytest.mark.parametrize("first, second, code", [("SIGTERM", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130),
                                                 ("SIGINT", "SIGINT", 130)])
@pytest.mark.few(1)
def test_a_second_signal_ends_at_once(first, second, code):
    process = child("wait", 60)
    for _ in range(3):  # from the system and from a launcher, say: one wish
        process.send_signal(signal.Signals[first])
        time.sleep(0.1)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.Signals[second])
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and f"{second} again: ended at once" in err


def test_a_second_signal_ends_a_main_thread_that_hangs():
    process = child("hang_in_the_main_thread", 60)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_work_that_nobody_needs_any_more_is_given_up():
    done = []
    with pytest.raises(Stopped):
        with stopping_on_signals(60) as stop:
            with pytest.raises(Interrupted):
                try:
                    with stop.interrupting():
                        raised(signal.SIGTERM, stop)
                        done.append("not reached")
                finally:
                    done.append("put right")
            with stop.interrupting():
                done.append("once")
            assert stop.signal == signal.SIGTERM
    assert done == ["put right", "once"]


def test_outside_such_work_nothing_is_given_up():
    with pytest.raises(Stopped):
        with stopping_on_signals(60) as stop:
            with stop.interrupting():
                pass
            raised(signal.SIGTERM, stop)
            assert stop.signal == signal.SIGTERM
